package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
)

// refusal is an answer that a change gets before it has written anything, so
// that the changes beside it in the batch are untouched.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

// job is one change under way. apply may run more than once, each time in a
// transaction in which nothing of its earlier runs is left.
type job struct {
	apply func(tx *tx) error
	alone bool // not beside others: it may fail after it has written
	done  chan error
}

// writer owns the only connection that writes.
type writer struct {
	tx     *tx
	turn   *os.File // see begin
	queue  chan *job
	stop   chan struct{} // closed by the first close
	once   sync.Once     // of that
	broken chan struct{}

	mu      sync.Mutex
	why     error
	changed chan struct{} // closed and replaced after each commit
	ended   chan struct{}
}

// batchMost bounds a batch, so that the first caller in it does not wait for
// an endless queue.
const batchMost = 256

func newWriter(ctx context.Context, db *sql.DB, turn string) (*writer, error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(turn, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	w := &writer{
		tx:      &tx{conn: conn, stmts: map[string]*sql.Stmt{}},
		turn:    file,
		queue:   make(chan *job, batchMost),
		stop:    make(chan struct{}),
		broken:  make(chan struct{}),
		changed: make(chan struct{}),
		ended:   make(chan struct{}),
	}
	go w.run()
	return w, nil
}

// do runs one job and answers once it is durable, or not recorded at all. A
// caller whose context ends before the job is taken gets the context's error;
// once it is taken, the answer is waited for, so that the caller knows.
func (w *writer) do(ctx context.Context, alone bool, apply func(*tx) error) error {
	j := &job{apply: apply, alone: alone, done: make(chan error, 1)}
	if err := w.err(); err != nil {
		return err
	}
	select {
	case w.queue <- j:
	case <-w.stop:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-j.done:
		return err
	case <-w.ended:
		select {
		case err := <-j.done:
			return err
		default:
			return ErrClosed // taken by nobody
		}
	}
}

func (w *writer) run() {
	defer close(w.ended)
	for {
		select {
		case j := <-w.queue:
			w.take(j)
		case <-w.stop:
			for {
				select {
				case j := <-w.queue:
					w.take(j)
				default:
					return
				}
			}
		}
	}
}

// take commits a job together with whatever else is waiting.
func (w *writer) take(first *job) {
	batch := []*job{first}
	for len(batch) < batchMost {
		select {
		case j := <-w.queue:
			batch = append(batch, j)
			continue
		default:
		}
		break
	}
	for len(batch) > 0 {
		n := together(batch)
		w.commit(batch[:n])
		batch = batch[n:]
	}
}

// together counts the jobs at the head of the queue that share a transaction.
func together(batch []*job) int {
	for i, j := range batch {
		if j.alone {
			return max(i, 1)
		}
	}
	return len(batch)
}

// commit records a batch. An SQL error may have undone the whole transaction
// or part of it (a full disk, an I/O error), so the batch is rolled back and
// each of its jobs tried alone: a bad one fails alone.
func (w *writer) commit(batch []*job) {
	if err := w.err(); err != nil {
		answer(batch, err)
		return
	}
	if err := w.begin(); err != nil { // not the fault of any of them
		answer(batch, fmt.Errorf("store: begin: %w", err))
		return
	}
	errs, err := w.try(batch)
	switch {
	case err == nil:
		w.announce()
		for i, j := range batch {
			j.done <- errs[i]
		}
	case w.err() != nil || len(batch) == 1:
		answer(batch, err)
	default:
		for _, j := range batch {
			w.commit([]*job{j})
		}
	}
}

func answer(batch []*job, err error) {
	for _, j := range batch {
		j.done <- err
	}
}

// begin starts a transaction when it is this process's turn. Processes queue at
// a file lock, because SQLite's own way of waiting (ask again after ever longer
// pauses) can keep a second process out for as long as the first is busy.
func (w *writer) begin() error {
	if err := flockFile(w.turn, syscall.LOCK_EX); err != nil {
		return err
	}
	defer func() { _ = flockFile(w.turn, syscall.LOCK_UN) }() // cannot fail on a file that is open
	return w.tx.exec("BEGIN IMMEDIATE")
}

// try runs a batch in the transaction that was begun. err is nil when it was
// committed; errs then holds each job's refusal.
func (w *writer) try(batch []*job) (errs []error, err error) {
	errs = make([]error, len(batch))
	for i, j := range batch {
		err := j.apply(w.tx)
		var no refusal
		if errors.As(err, &no) && !j.alone {
			errs[i] = no.error
			continue
		}
		if err != nil {
			return nil, w.rollback(err)
		}
	}
	if err := w.tx.exec("COMMIT"); err != nil {
		return nil, w.fail(fmt.Errorf("commit: %w", err))
	}
	return errs, nil
}

// rollback undoes the transaction. SQLite may have done so itself: then there
// is none to roll back, which "ROLLBACK" reports as an error.
func (w *writer) rollback(cause error) error {
	err := w.tx.exec("ROLLBACK")
	if err == nil {
		return cause
	}
	if e := w.tx.exec("BEGIN"); e == nil { // deferred: it needs no turn
		if e = w.tx.exec("ROLLBACK"); e == nil {
			return cause // no transaction stood any more
		}
	}
	return w.fail(fmt.Errorf("rollback after %w: %w", cause, err))
}

// fail makes the store unusable.
func (w *writer) fail(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.why == nil {
		w.why = fmt.Errorf("%w (%w)", ErrUnusable, err)
		close(w.broken)
	}
	return w.why
}

func (w *writer) err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.why
}

func (w *writer) announce() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *writer) next() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

func (w *writer) close() error {
	err := error(nil)
	w.once.Do(func() {
		close(w.stop)
		<-w.ended
		err = errors.Join(w.tx.close(), w.turn.Close())
	})
	return err
}

// tx is the writer's connection. Statements are compiled once. It never sees a
// request's context: a caller who goes away must not interrupt the others.
type tx struct {
	conn  *sql.Conn
	stmts map[string]*sql.Stmt
}

func (t *tx) stmt(q string) (*sql.Stmt, error) {
	if s, ok := t.stmts[q]; ok {
		return s, nil
	}
	s, err := t.conn.PrepareContext(context.Background(), q)
	if err == nil {
		t.stmts[q] = s
	}
	return s, err
}

func (t *tx) exec(q string, args ...any) error {
	_, err := t.insert(q, args...)
	return err
}

// insert answers with the row id.
func (t *tx) insert(q string, args ...any) (int64, error) {
	s, err := t.stmt(q)
	if err != nil {
		return 0, err
	}
	r, err := s.Exec(args...)
	if err != nil {
		return 0, err
	}
	return r.LastInsertId()
}

// row scans the first row of a query, or answers ErrNotFound.
func (t *tx) row(q string, args []any, dest ...any) error {
	s, err := t.stmt(q)
	if err != nil {
		return err
	}
	err = s.QueryRow(args...).Scan(dest...)
	if errors.Is(err, sql.ErrNoRows) {
		return ErrNotFound
	}
	return err
}

func (t *tx) close() error {
	var errs []error
	for _, s := range t.stmts {
		errs = append(errs, s.Close())
	}
	return errors.Join(append(errs, t.conn.Close())...)
}
