package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/event"
)

// TestGroupCommit: whatever waits travels in one transaction, and so with one
// sync to disk, and those who are refused do not hold up the others.
func TestGroupCommit(t *testing.T) {
	ctx := testContext(t)
	db, folder := open(t)
	mustCommit(t, db, full(1, 1))
	commits := countCommits(t, db)
	const n = 100
	var changes []Change
	for i := range int64(n) {
		changes = append(changes, full(100+i, 1))
	}
	conflict, repeat, uuid, revoked := full(100, 1), full(900, 1), full(901, 1), full(902, 1)
	repeat.Remember = append(repeat.Remember, remembered(101, 1))
	uuid.Locks[0].UUID = "uuid-102" // of a lock that is made in the same batch
	revoked.Requires.Credentials = []string{"nobody"}
	want := []error{event.ErrConflict, ErrRepeat, ErrUUIDTaken, ErrRevoked}

	release := hold(t, db)
	answers := ask(t, db, append(changes, conflict, repeat, uuid, revoked)...)
	release()
	for i, a := range answers {
		err := <-a
		if i < n && err != nil || i >= n && !errors.Is(err, want[i-n]) {
			t.Errorf("change %d: %v", i, err)
		}
	}
	if got := commits.Load(); got != 2 { // the one that held the writer, and the batch
		t.Errorf("%d commits for %d changes", got, n)
	}
	if records, err := db.After(ctx, 0, 2*n); err != nil || len(records) != n+1 {
		t.Errorf("%d records, want %d (%v)", len(records), n+1, err)
	}
	if left := dump(t, raw(t, folder)); strings.Contains(left, "lock/90") {
		t.Error("a refused change left something")
	}
}

// TestIdentityBetween: what may fail after it has written is committed by
// itself, in its place in the queue.
func TestIdentityBetween(t *testing.T) {
	ctx := testContext(t)
	db, _ := open(t)
	commits := countCommits(t, db)
	release := hold(t, db)
	first := ask(t, db, appending("lock/1", 0), appending("lock/2", 0))
	identity := make(asked, 2)
	go func() { identity <- db.CreateOrganization(ctx, Organization{ID: "acme"}) }()
	queued(t, db, 3)
	go func() { identity <- db.CreateOrganization(ctx, Organization{ID: "acme"}) }()
	queued(t, db, 4)
	last := make(asked, 1)
	go func() { last <- db.SaveShadows(ctx) }()
	queued(t, db, 5)
	release()
	for _, a := range append(first, last) {
		if err := <-a; err != nil {
			t.Error(err)
		}
	}
	if a, b := <-identity, <-identity; a != nil || !errors.Is(b, ErrExists) {
		t.Errorf("made twice: %v, then %v", a, b)
	}
	if got := commits.Load(); got != 4 { // holding, two together, one identity, the last
		t.Errorf("%d commits", got)
	}
}

// TestGivenUp: who gives up before the writer has taken the job hears so, who
// gives up later hears what became of it.
func TestGivenUp(t *testing.T) {
	db, _ := open(t)
	release := hold(t, db)
	ctx, cancel := context.WithCancel(testContext(t))
	answer := make(asked, 1)
	go func() { _, err := db.Commit(ctx, appending("lock/1", 0)); answer <- err }()
	queued(t, db, 1)
	cancel()
	var others []Change
	for i := range batchMost - 1 {
		others = append(others, appending(event.Stream(fmt.Sprint("other/", i)), 0))
	}
	for i, c := range others {
		go func() { _, _ = db.Commit(context.Background(), c) }()
		queued(t, db, i+2)
	}
	if _, err := db.Commit(ctx, appending("lock/2", 0)); !errors.Is(err, context.Canceled) { // no room
		t.Errorf("given up before it was taken: %v", err)
	}
	release()
	if err := <-answer; err != nil {
		t.Errorf("given up after it was queued: %v", err)
	}
	if length(t, db, "lock/1") != 1 || length(t, db, "lock/2") != 0 {
		t.Error("the answers were untrue")
	}
}

// TestBusy: when another process does not let go of the database, a batch waits
// for it once, not once a change.
func TestBusy(t *testing.T) {
	db, folder := open(t)
	if err := db.writer.tx.exec("PRAGMA busy_timeout = 300"); err != nil {
		t.Fatal(err)
	}
	other := raw(t, folder)
	other.SetMaxOpenConns(1)
	mustExec(t, other, "BEGIN IMMEDIATE")
	const n = 20
	answers := make(asked, n)
	begin := time.Now()
	for i := range n {
		go func() {
			_, err := db.Commit(context.Background(), appending(event.Stream(fmt.Sprint("lock/", i)), 0))
			answers <- err
		}()
	}
	for range n {
		if err := <-answers; err == nil || errors.Is(err, ErrUnusable) {
			t.Errorf("the database is taken: %v", err)
		}
	}
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("%d changes waited %s", n, took)
	}
	mustExec(t, other, "ROLLBACK")
	for i := range n {
		mustAppend(t, db, event.Stream(fmt.Sprint("lock/", i)), 0) // nothing was recorded, and all goes on
	}
}

// big is a change too big for what a full disk has left.
func big(s event.Stream) Change {
	c := appending(s, 0)
	c.Shadows = full(9, 1).Shadows
	c.Shadows[0].Document = bytes.Repeat([]byte("x"), 1<<20)
	return c
}

// TestNoMorePages fills the database to a limit of SQLite's own, which undoes
// the whole transaction in the middle of a batch.
func TestNoMorePages(t *testing.T) {
	db, _ := open(t)
	limit := func(pages int) {
		t.Helper()
		if err := db.writer.do(testContext(t), true, func(tx *tx) error {
			return tx.exec(fmt.Sprint("PRAGMA max_page_count = ", pages))
		}); err != nil {
			t.Fatal(err)
		}
	}
	mustAppend(t, db, "lock/0", 0)
	limit(100)
	before := dump(t, db.read)
	if _, err := db.Commit(testContext(t), big("lock/1")); err == nil || errors.Is(err, ErrUnusable) {
		t.Errorf("too big: %v", err)
	}
	if dump(t, db.read) != before {
		t.Error("what did not fit left something")
	}

	release := hold(t, db)
	answers := ask(t, db, appending("lock/2", 0), big("lock/3"), appending("lock/4", 0))
	release()
	for i, a := range answers {
		if err := <-a; (err != nil) != (i == 1) || errors.Is(err, ErrUnusable) {
			t.Errorf("change %d: %v", i, err)
		}
	}
	for s, want := range map[event.Stream]int{"lock/2": 1, "lock/3": 0, "lock/4": 1} {
		if n := length(t, db, s); n != want {
			t.Errorf("%s has %d records, want %d", s, n, want)
		}
	}
	limit(1 << 30)
	mustCommit(t, db, big("lock/3")) // there is room again
}

// TestFullDisk writes until a disk is full. Whatever the store then says it is
// true to it, and nothing that was acknowledged is lost.
func TestFullDisk(t *testing.T) {
	folder := t.TempDir()
	if err := syscall.Mount("tmpfs", folder, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("needs a small disk of its own: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(folder, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	filler := filepath.Join(folder, "filler")
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	db := mustOpen(t, folder)
	acked, err := fill(t, db)
	if !errors.Is(err, ErrUnusable) {
		t.Logf("the disk was full before the commit: %v", err)
	} else {
		mustBeBroken(t, db)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	_ = db.Close() // may have met the full disk too
	db = mustOpen(t, folder)
	defer mustClose(t, db)
	if n := length(t, db, "lock/1"); n < acked || n > acked+1 { // the fate of the last one is unknown
		t.Errorf("%d records, %d were acknowledged", n, acked)
	}
	mustAppend(t, db, "lock/2", 0)
}

func fill(t *testing.T, db *DB) (acked int, err error) {
	for ; acked < 1000; acked++ {
		c := appending("lock/1", int64(acked))
		c.Appends[0].Events[0].Data = fmt.Appendf(nil, "%q", strings.Repeat("x", 10_000))
		if _, err := db.Commit(testContext(t), c); err != nil {
			return acked, err
		}
	}
	t.Fatal("the disk never was full")
	return
}

// mustBeBroken holds that a store says of itself that it is unusable.
func mustBeBroken(t *testing.T, db *DB) {
	t.Helper()
	select {
	case <-db.Broken():
	default:
		t.Error("Broken is not closed")
	}
	if !errors.Is(db.Err(), ErrUnusable) {
		t.Errorf("Err is %v", db.Err())
	}
	ctx := testContext(t)
	if _, err := db.Append(ctx, appending("lock/later", 0).Appends[0]); !errors.Is(err, ErrUnusable) {
		t.Errorf("append: %v", err)
	}
	if err := db.CreateOrganization(ctx, Organization{ID: "later"}); !errors.Is(err, ErrUnusable) {
		t.Errorf("identity: %v", err)
	}
}

// TestFailedCommit: after a COMMIT that failed nobody is told anything but that,
// neither those in the batch nor those behind it, until the store is opened anew.
func TestFailedCommit(t *testing.T) {
	folder := t.TempDir()
	db := mustOpen(t, folder)
	mustAppend(t, db, "lock/0", 0)
	if db.Err() != nil {
		t.Errorf("all is well, yet: %v", db.Err())
	}
	var commits atomic.Int64
	onCommit(t, db, func() bool { return commits.Add(1) == 2 }) // of the batch alone: once is enough
	release := hold(t, db)
	answers := ask(t, db, appending("lock/1", 0), appending("lock/1", 9), appending("lock/2", 0))
	identity := make(asked, 1)
	go func() { identity <- db.SetSetting(context.Background(), "a", "b") }() // in a transaction behind theirs
	queued(t, db, 4)
	release()
	for i, a := range append(answers, identity) {
		if err := <-a; !errors.Is(err, ErrUnusable) {
			t.Errorf("job %d: %v", i, err)
		}
	}
	mustBeBroken(t, db)
	if length(t, db, "lock/0") != 1 {
		t.Error("what was recorded cannot be read any more")
	}
	mustClose(t, db)

	db = mustOpen(t, folder)
	defer mustClose(t, db)
	for s, want := range map[event.Stream]int{"lock/0": 1, "lock/1": 0, "lock/2": 0, "lock/later": 0} {
		if n := length(t, db, s); n != want {
			t.Errorf("%s has %d records, want %d", s, n, want)
		}
	}
	mustAppend(t, db, "lock/1", 0)
}
