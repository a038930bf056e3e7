package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/event/eventtest"
	"modernc.org/sqlite"
)

func TestLog(t *testing.T) {
	eventtest.Run(t, func(t *testing.T) func() (event.Log, func()) {
		folder := t.TempDir()
		return func() (event.Log, func()) {
			db := mustOpen(t, folder)
			return db, func() { mustClose(t, db) }
		}
	})
}

func mustOpen(t testing.TB, folder string) *DB {
	t.Helper()
	db, err := Open(context.Background(), folder)
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func mustClose(t testing.TB, db *DB) {
	t.Helper()
	if err := db.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// open opens a database in a folder of its own.
func open(t testing.TB) (db *DB, folder string) {
	folder = t.TempDir()
	db = mustOpen(t, folder)
	t.Cleanup(func() { mustClose(t, db) })
	return db, folder
}

// testContext ends a test that hangs.
func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// raw is a connection around the store.
func raw(t testing.TB, folder string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", dsn(filepath.Join(folder, File)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func mustExec(t testing.TB, db *sql.DB, q string) {
	t.Helper()
	if _, err := db.Exec(q); err != nil {
		t.Fatalf("%s: %v", q, err)
	}
}

// dump is every row that is stored, as text. What goose notes is left out.
func dump(t testing.TB, db *sql.DB) string {
	t.Helper()
	var b strings.Builder
	for _, table := range column(t, db, `SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'goose%' AND name NOT LIKE 'sqlite%'`) {
		values := column(t, db, `SELECT 'quote("' || name || '")' FROM pragma_table_info('`+table+`')`)
		for _, row := range column(t, db, `SELECT `+strings.Join(values, " || ' ' || ")+` FROM `+table+` ORDER BY 1`) {
			fmt.Fprintf(&b, "%s %s\n", table, row)
		}
	}
	return b.String()
}

// column is the first column of a query.
func column(t testing.TB, db *sql.DB, q string) (all []string) {
	t.Helper()
	rows, err := db.Query(q)
	if err != nil {
		t.Fatalf("%s: %v", q, err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var s string
		if err := rows.Scan(&s); err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

// hold keeps the writer busy, so that what is asked of it meanwhile travels in
// one batch.
func hold(t testing.TB, db *DB) (release func()) {
	t.Helper()
	began, end, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- db.writer.do(context.Background(), true, func(*tx) error {
			close(began)
			<-end
			return nil
		})
	}()
	<-began
	return func() {
		close(end)
		if err := <-ended; err != nil && !errors.Is(err, ErrUnusable) {
			t.Errorf("holding the writer: %v", err)
		}
	}
}

// queued waits until n jobs stand before the writer.
func queued(t testing.TB, db *DB, n int) {
	t.Helper()
	for begin := time.Now(); len(db.writer.queue) < n; runtime.Gosched() {
		if time.Since(begin) > time.Minute {
			t.Fatalf("%d jobs are queued, want %d", len(db.writer.queue), n)
		}
	}
}

// asked is the answer to a call under way.
type asked chan error

// ask commits changes at once; they stand before the writer, in this order,
// when it returns.
func ask(t testing.TB, db *DB, changes ...Change) []asked {
	t.Helper()
	var all []asked
	for i, c := range changes {
		a := make(asked, 1)
		go func() {
			_, err := db.Commit(context.Background(), c)
			a <- err
		}()
		queued(t, db, i+1)
		all = append(all, a)
	}
	return all
}

// onCommit calls f in every COMMIT of the writer; it fails if f says so.
func onCommit(t testing.TB, db *DB, f func() (fail bool)) {
	t.Helper()
	err := db.writer.tx.conn.Raw(func(conn any) error {
		conn.(sqlite.HookRegisterer).RegisterCommitHook(func() int32 {
			if f() {
				return 1
			}
			return 0
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// countCommits counts transactions that the writer commits.
func countCommits(t testing.TB, db *DB) *atomic.Int64 {
	t.Helper()
	var n atomic.Int64
	onCommit(t, db, func() bool { n.Add(1); return false })
	return &n
}

// appending is a change of one event.
func appending(s event.Stream, expect int64) Change {
	return Change{Appends: []event.Append{{Stream: s, Expect: expect, Time: time.UnixMilli(1), Events: []event.New{
		{Type: "Happened", Schema: 1, Data: []byte(`{}`)},
	}}}}
}

func mustAppend(t testing.TB, db *DB, s event.Stream, expect int64) {
	t.Helper()
	if _, err := db.Commit(testContext(t), appending(s, expect)); err != nil {
		t.Fatalf("append to %s at %d: %v", s, expect, err)
	}
}

// length is how many records a stream has.
func length(t testing.TB, db *DB, s event.Stream) int {
	t.Helper()
	records, err := db.Stream(testContext(t), s, 1, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	return len(records)
}

func TestOpenMigrates(t *testing.T) {
	folder := t.TempDir()
	mustClose(t, mustOpen(t, folder))
	files, err := migrations.ReadDir("migrations")
	if err != nil {
		t.Fatal(err)
	}
	schema := func() string {
		return strings.Join(column(t, raw(t, folder), `SELECT 'migration ' || version_id || ' at ' || tstamp FROM goose_db_version
			UNION ALL SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL`), "\n")
	}
	before := schema()
	if applied := strings.Count(before, "migration "); applied != len(files)+1 { // goose counts from 0
		t.Errorf("%d migrations in\n%s\nwant %d", applied, before, len(files)+1)
	}
	for range 3 {
		mustClose(t, mustOpen(t, folder))
	}
	if after := schema(); after != before {
		t.Errorf("opening it again changed it from\n%s\nto\n%s", before, after)
	}
}

func TestOpenAtOnce(t *testing.T) {
	folder := t.TempDir()
	errs := make(chan error)
	for range 8 {
		go func() {
			db, err := Open(context.Background(), folder)
			if err == nil {
				err = db.Close()
			}
			errs <- err
		}()
	}
	for range 8 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func TestOpenRefusesNewer(t *testing.T) {
	folder := t.TempDir()
	mustClose(t, mustOpen(t, folder))
	db := raw(t, folder)
	mustExec(t, db, `INSERT INTO goose_db_version (version_id, is_applied) VALUES (9999, 1)`)
	_, err := Open(testContext(t), folder)
	if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "9999") || !strings.Contains(err.Error(), File) {
		t.Errorf("schema of a newer openlock: %v", err)
	}
}

func TestOpenRefusesOthersFiles(t *testing.T) {
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, File), []byte(strings.Repeat("not a database\n", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(testContext(t), folder); err == nil || !strings.Contains(err.Error(), File) {
		t.Errorf("a file that is no database: %v", err)
	}
	if _, err := Open(testContext(t), filepath.Join(folder, "nowhere")); err == nil {
		t.Error("a folder that does not exist was opened")
	}
}

func TestFilesArePrivate(t *testing.T) {
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, File), nil, 0o644); err != nil { // from a careless copy
		t.Fatal(err)
	}
	db := mustOpen(t, folder)
	defer mustClose(t, db)
	mustAppend(t, db, "lock/1", 0)
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, e := range entries {
		seen[e.Name()] = true
		if info, err := e.Info(); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s has mode %v, %v", e.Name(), info.Mode(), err)
		}
	}
	if !seen[File] || !seen[File+"-wal"] {
		t.Errorf("found only %v", seen)
	}
}

// TestOpenKeepsLocks: opening a database a second time in one process must not
// cost the first the locks that keep other processes from its log.
func TestOpenKeepsLocks(t *testing.T) {
	db, folder := open(t)
	mustAppend(t, db, "lock/1", 0)
	info, err := os.Stat(filepath.Join(folder, File))
	if err != nil {
		t.Fatal(err)
	}
	inode := fmt.Sprintf(":%d ", info.Sys().(*syscall.Stat_t).Ino)
	locked := func() bool {
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			t.Skipf("locks cannot be seen here: %v", err)
		}
		return strings.Contains(string(locks), inode)
	}
	if !locked() {
		t.Skip("locks of this file system cannot be seen here")
	}
	if _, err := Open(canceled(), folder); err == nil { // gives up as soon as it has looked at the file
		t.Error("opened though it was given up")
	}
	if !locked() {
		t.Error("the database is not locked any more")
	}
}

func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

func TestPragmas(t *testing.T) {
	db, _ := open(t)
	for pragma, want := range map[string]string{
		"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1", "busy_timeout": "10000", "wal_autocheckpoint": "1000",
	} {
		var got string
		if err := db.writer.tx.row("PRAGMA "+pragma, nil, &got); err != nil || got != want {
			t.Errorf("%s of the writer is %s, want %s (%v)", pragma, got, want, err)
		}
	}
	if _, err := db.read.Exec(`DELETE FROM events`); err == nil {
		t.Error("a reader could write")
	}
}

func TestLockFolder(t *testing.T) {
	folder := t.TempDir()
	unlock, err := LockFolder(folder)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LockFolder(folder); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), folder) {
		t.Errorf("second: %v", err)
	}
	other, err := LockFolder(t.TempDir())
	if err != nil {
		t.Fatalf("another folder: %v", err)
	}
	other()
	unlock()
	again, err := LockFolder(folder)
	if err != nil {
		t.Fatalf("after it was given free: %v", err)
	}
	again()
}

func TestCloseDrains(t *testing.T) {
	folder := t.TempDir()
	db := mustOpen(t, folder)
	release := hold(t, db)
	const n = 50
	var changes []Change
	for i := range n {
		changes = append(changes, appending(event.Stream(fmt.Sprint("lock/", i)), 0))
	}
	answers := ask(t, db, changes...)
	closed := make(chan error)
	go func() { closed <- db.Close() }()
	<-db.writer.stop
	release()
	for i, a := range answers {
		if err := <-a; err != nil {
			t.Errorf("change %d was queued before Close: %v", i, err)
		}
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	db = mustOpen(t, folder)
	defer mustClose(t, db)
	if records, err := db.After(testContext(t), 0, 2*n); err != nil || len(records) != n {
		t.Errorf("%d records, want %d (%v)", len(records), n, err)
	}
}

func TestClosed(t *testing.T) {
	ctx := testContext(t)
	db := mustOpen(t, t.TempDir())
	mustAppend(t, db, "lock/1", 0)
	mustClose(t, db)
	mustClose(t, db) // twice does no harm
	for name, call := range map[string]func() error{
		"commit":  func() error { _, err := db.Commit(ctx, appending("lock/1", 1)); return err },
		"setting": func() error { return db.SetSetting(ctx, "a", "b") },
		"stream":  func() error { _, err := db.Stream(ctx, "lock/1", 1, 1); return err },
		"lock":    func() error { _, err := db.Lock(ctx, 1); return err },
		"wait":    func() error { return db.Wait(ctx, 1) },
	} {
		for range 20 { // the queue still has room
			if err := call(); !errors.Is(err, ErrClosed) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// TestCloseRaces closes while others write, wait and read: none hangs, and what
// was acknowledged is there afterwards, no less and no more.
func TestCloseRaces(t *testing.T) {
	ctx, folder := testContext(t), t.TempDir()
	for round := range 10 {
		db := mustOpen(t, folder)
		var all sync.WaitGroup
		acked := make([]int, 16)
		for i := range acked {
			s := event.Stream(fmt.Sprint("lock/", round, "/", i))
			all.Go(func() {
				var err error
				for ; err == nil; acked[i]++ {
					_, err = db.Commit(ctx, appending(s, int64(acked[i])))
				}
				acked[i]--
				ended(t, "write", err)
			})
			all.Go(func() { ended(t, "wait", db.Wait(ctx, 1<<60)) })
			all.Go(func() {
				var err error
				for err == nil {
					_, err = db.Stream(ctx, s, 1, 1)
				}
				ended(t, "read", err)
			})
		}
		if err := db.Wait(ctx, event.Position(round*5)); err != nil {
			t.Error(err)
		}
		mustClose(t, db)
		all.Wait()

		db = mustOpen(t, folder)
		for i := range acked {
			if n := length(t, db, event.Stream(fmt.Sprint("lock/", round, "/", i))); n != acked[i] {
				t.Errorf("%d records, %d were acknowledged", n, acked[i])
			}
		}
		mustClose(t, db)
	}
}

func ended(t *testing.T, what string, err error) {
	if !errors.Is(err, ErrClosed) {
		t.Errorf("%s ended with: %v", what, err)
	}
}

// TestTwoProcesses has an operator change identities beside a server under
// load. Neither fails, neither waits long, both see everything.
func TestTwoProcesses(t *testing.T) {
	ctx, folder := testContext(t), t.TempDir()
	server, operator := mustOpen(t, folder), mustOpen(t, folder)
	defer mustClose(t, server)
	defer mustClose(t, operator)
	stop := make(chan struct{})
	var load sync.WaitGroup
	for i := range 2 {
		load.Go(func() {
			for v := int64(0); ; v++ {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := server.Commit(ctx, appending(event.Stream(fmt.Sprint("lock/", i)), v)); err != nil {
					t.Errorf("load: %v", err)
					return
				}
			}
		})
	}
	const changes = 50
	worst := time.Duration(0)
	for i := range changes {
		if err := server.Wait(ctx, event.Position(20*i)); err != nil { // the load is on
			t.Fatal(err)
		}
		begin := time.Now()
		if err := operator.CreateOrganization(ctx, Organization{ID: fmt.Sprint("org", i), CreatedAt: begin}); err != nil {
			t.Errorf("operator: %v", err)
		}
		worst = max(worst, time.Since(begin))
		if _, err := server.Organization(ctx, fmt.Sprint("org", i)); err != nil {
			t.Errorf("what the operator changed is not seen by the server: %v", err)
		}
	}
	close(stop)
	load.Wait()
	if worst > time.Second {
		t.Errorf("the operator waited up to %s", worst)
	}
	a, errA := server.After(ctx, 0, 1<<20)
	b, errB := operator.After(ctx, 0, 1<<20)
	if errA != nil || errB != nil || len(a) != len(b) || len(a) == 0 {
		t.Errorf("server sees %d records, operator %d (%v, %v)", len(a), len(b), errA, errB)
	}
}
