// Package store keeps everything that must last: the log, what is folded from
// it, shadows and credentials. It is the only room that speaks SQL.
//
// There is one writer. It takes whatever changes are waiting, commits them
// together with one sync to disk and answers each (group commit without a
// timer). Readers have connections of their own and see committed changes only.
//
// Whoever needs several things to be recorded together says so in one Change;
// nobody holds a transaction. Publishing, answering and filling caches come
// after Commit has returned.
package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // the SQLite engine, without cgo
)

var (
	// ErrNotFound says that there is no such row.
	ErrNotFound = errors.New("store: not found")
	// ErrUnusable says that the truth on disk is no longer known (a commit
	// failed): nothing more is recorded until the process is started again.
	ErrUnusable = errors.New("store: stopped after a failed commit; free or repair the disk and start openlock again")
	// ErrClosed says that the store was closed.
	ErrClosed = errors.New("store: closed")
	// ErrLocked says that another openlock serves from the same folder.
	ErrLocked = errors.New("store: another openlock is serving from this folder")
	// ErrNewer says that a newer openlock has brought the database forward.
	ErrNewer = errors.New("store: the database was written by a newer openlock; run that one or a later one")
)

//go:embed migrations/*.sql
var migrations embed.FS

// DB is a data folder's database, on SQLite.
type DB struct {
	write  *sql.DB
	read   *sql.DB
	writer *writer
	stmts  sync.Map // query -> *sql.Stmt on read
}

// File is the name of the database within a data folder.
const File = "openlock.db"

// Open opens the database in a data folder, creating and migrating it as
// needed. Several processes may have it open; only one may serve (LockFolder).
func Open(ctx context.Context, folder string) (*DB, error) {
	path := filepath.Join(folder, File)
	if err := migrate(ctx, folder, path); err != nil {
		return nil, err
	}
	write, err := sql.Open("sqlite", dsn(path, "_txlock=immediate", "_pragma=wal_autocheckpoint(1000)"))
	if err != nil {
		return nil, err
	}
	read, err := sql.Open("sqlite", dsn(path, "_pragma=query_only(1)"))
	if err != nil {
		return nil, errors.Join(err, write.Close())
	}
	read.SetMaxOpenConns(readers)
	read.SetMaxIdleConns(readers)
	if err := errors.Join(reserve(ctx, write, 1), reserve(ctx, read, readers)); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, err), write.Close(), read.Close())
	}
	w, err := newWriter(ctx, write, filepath.Join(folder, "write.lock"))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, err), write.Close(), read.Close())
	}
	return &DB{write: write, read: read, writer: w}, nil
}

// readers is how many connections read: more than the API lets GET requests use.
const readers = 6

// reserve opens connections before they are needed: when the process runs out
// of file descriptors, what it has still works.
func reserve(ctx context.Context, db *sql.DB, n int) error {
	for range n {
		c, err := db.Conn(ctx)
		if err != nil {
			return err
		}
		defer c.Close() // back into the pool, once all are open

		// SQLite opens its files at first use.
		if _, err := c.ExecContext(ctx, `SELECT 1 FROM sqlite_schema`); err != nil {
			return err
		}
	}
	return nil
}

// dsn: WAL with synchronous=FULL syncs the log to disk at every commit
// (https://sqlite.org/pragma.html#pragma_synchronous).
func dsn(path string, more ...string) string {
	q := "_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)"
	for _, m := range more {
		q += "&" + m
	}
	return (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: q}).String()
}

// migrate brings the schema forward. goose takes no lock on SQLite, so a file
// lock keeps two processes from migrating at once.
func migrate(ctx context.Context, folder, path string) (err error) {
	unlock, err := flock(filepath.Join(folder, "migrate.lock"), syscall.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	if err := createPrivate(path); err != nil {
		return err
	}
	db, err := sql.Open("sqlite", dsn(path))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	sub, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, sub, goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	// goose itself is content with a schema that it does not know.
	if has, known, err := p.GetVersions(ctx); err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	} else if has > known {
		return fmt.Errorf("%w (%s has schema %d, this openlock knows %d)", ErrNewer, path, has, known)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("bring %s to this version's schema: %w", path, err)
	}
	return nil
}

// createPrivate makes a file that nobody else may read, for it will hold hashes
// of credentials and names of people. It comes before SQLite, which would let
// the umask decide, and which gives its own files beside it the same mode. A
// database that exists is not opened here: to close it would drop the locks that
// SQLite holds on it in this process (https://sqlite.org/howtocorrupt.html, 2.2).
func createPrivate(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return os.Chmod(path, 0o600)
	}
	if err != nil {
		return err
	}
	return f.Close()
}

// LockFolder makes this process the one that serves from a data folder. It
// refuses with ErrLocked. The lock ends with the process.
func LockFolder(folder string) (unlock func(), err error) {
	unlock, err = flock(filepath.Join(folder, "serve.lock"), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, fmt.Errorf("%w: %s", ErrLocked, folder)
	}
	return unlock, err
}

func flock(path string, how int) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flockFile(f, how); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

func flockFile(f *os.File, how int) error {
	for {
		err := syscall.Flock(int(f.Fd()), how)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// Broken is closed when the store has become unusable.
func (db *DB) Broken() <-chan struct{} { return db.writer.broken }

// Err says why the store is unusable, nil while it is not.
func (db *DB) Err() error { return db.writer.err() }

// Close waits for changes under way and closes the database. What comes later
// gets ErrClosed.
func (db *DB) Close() error {
	werr := db.writer.close()
	return errors.Join(werr, db.read.Close(), db.write.Close())
}

// query runs on a reader. Statements are compiled once.
func (db *DB) query(ctx context.Context, q string, args ...any) (*sql.Rows, error) {
	s, err := db.prepared(ctx, q)
	if err != nil {
		return nil, err
	}
	rows, err := s.QueryContext(ctx, args...)
	return rows, db.unlessClosed(err)
}

// row scans the first row of a query, or answers ErrNotFound.
func (db *DB) row(ctx context.Context, q string, args []any, dest ...any) error {
	s, err := db.prepared(ctx, q)
	if err != nil {
		return err
	}
	err = s.QueryRowContext(ctx, args...).Scan(dest...)
	if errors.Is(err, sql.ErrNoRows) {
		return ErrNotFound
	}
	return db.unlessClosed(err)
}

// unlessClosed is a reader's error, which is ErrClosed once the store is closed.
func (db *DB) unlessClosed(err error) error {
	if err == nil {
		return nil
	}
	select {
	case <-db.writer.ended:
		return ErrClosed
	default:
		return err
	}
}

func (db *DB) prepared(ctx context.Context, q string) (*sql.Stmt, error) {
	if s, ok := db.stmts.Load(q); ok {
		return s.(*sql.Stmt), nil
	}
	s, err := db.read.PrepareContext(ctx, q)
	if err != nil {
		return nil, db.unlessClosed(err)
	}
	if other, loaded := db.stmts.LoadOrStore(q, s); loaded {
		_ = s.Close() // another reader compiled it first
		return other.(*sql.Stmt), nil
	}
	return s, nil
}
