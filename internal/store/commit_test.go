package store

import (
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/shadow"
)

var moment = time.UnixMilli(1_780_000_000_000).UTC()

// full is a change with a row of every kind about lock n, at a version.
func full(n, version int64) Change {
	c := appending(event.Stream(fmt.Sprint("lock/", n)), version-1)
	c.Locks = []LockRow{{ID: n, Version: version, UUID: fmt.Sprint("uuid-", n), State: fmt.Appendf(nil, `{"version":%d}`, version)}}
	c.Commands = []CommandRow{{ID: fmt.Sprintf("command-%d-%d", n, version), Lock: n, Version: version, IssuedAt: moment, ExpiresAt: moment.Add(time.Second)}}
	c.Shadows = []shadow.Row{{Thing: fmt.Sprint("thing-", n), Name: "", Document: fmt.Appendf(nil, "%d", version)}, {Thing: fmt.Sprint("thing-", n), Name: "name", Document: []byte{0, 0xff}}}
	c.Remember = []Repeat{remembered(n, version)}
	c.Forget = []RepeatKey{remembered(n, version-1).RepeatKey}
	return c
}

func remembered(n, version int64) Repeat {
	return Repeat{
		RepeatKey:   RepeatKey{Caller: fmt.Sprint("caller-", n), Key: fmt.Sprint("key-", version)},
		Fingerprint: []byte{1, 0, 2}, Stream: event.Stream(fmt.Sprint("lock/", n)), Version: version, Event: true, Status: 201, Command: "c", CreatedAt: moment,
	}
}

func mustCommit(t testing.TB, db *DB, c Change) {
	t.Helper()
	if _, err := db.Commit(testContext(t), c); err != nil {
		t.Fatal(err)
	}
}

// refused holds that a change is refused and leaves nothing behind.
func refused(t *testing.T, db *DB, folder string, c Change, want error) {
	t.Helper()
	before := dump(t, raw(t, folder))
	records, err := db.Commit(testContext(t), c)
	if !errors.Is(err, want) || records != nil {
		t.Errorf("answer %v and %d records, want %v", err, len(records), want)
	}
	if after := dump(t, raw(t, folder)); after != before {
		t.Errorf("a refused change left something: from\n%s\nto\n%s", before, after)
	}
}

func TestCommitKeepsEveryRow(t *testing.T) {
	ctx := testContext(t)
	db, _ := open(t)
	mustCommit(t, db, full(1, 1))
	second := full(1, 2)
	second.Commands = append(second.Commands, full(1, 1).Commands[0])
	second.Commands[1].EndedAt, second.Commands[1].Outcome = moment.Add(time.Minute), []byte(`{"result":"opened"}`)
	mustCommit(t, db, second)

	if state, err := db.Lock(ctx, 1); err != nil || string(state) != `{"version":2}` {
		t.Errorf("lock: %s, %v", state, err)
	}
	for _, want := range second.Commands {
		if got, err := db.Command(ctx, 1, want.ID); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("command: %+v, want %+v (%v)", got, want, err)
		}
	}
	if pending, err := db.PendingCommands(ctx); err != nil || !reflect.DeepEqual(pending, second.Commands[:1]) {
		t.Errorf("pending: %+v, %v", pending, err)
	}
	if doc, err := db.LoadShadow(ctx, shadow.Address{Thing: "thing-1"}); err != nil || string(doc) != "2" {
		t.Errorf("shadow: %s, %v", doc, err)
	}
	if r, err := db.Repeat(ctx, second.Remember[0].RepeatKey); err != nil || !reflect.DeepEqual(r, second.Remember[0]) {
		t.Errorf("remembered: %+v, %v", r, err)
	}
	if _, err := db.Repeat(ctx, second.Forget[0]); !errors.Is(err, ErrNotFound) {
		t.Errorf("forgotten: %v", err)
	}
}

func TestCommandPages(t *testing.T) {
	db, _ := open(t)
	var c Change
	for i := range int64(6) {
		c.Commands = append(c.Commands, CommandRow{ID: fmt.Sprint("command-", i), Lock: i % 2, Version: i, IssuedAt: moment, ExpiresAt: moment})
	}
	mustCommit(t, db, c)
	for _, p := range []struct {
		since  int64
		before string
		limit  int
		want   []string
	}{
		{0, "", 10, []string{"command-4", "command-2", "command-0"}},
		{0, "", 2, []string{"command-4", "command-2"}},
		{0, "command-2", 2, []string{"command-0"}},
		{2, "", 10, []string{"command-4", "command-2"}},
	} {
		rows, err := db.Commands(testContext(t), 0, p.since, p.before, p.limit)
		var ids []string
		for _, r := range rows {
			ids = append(ids, r.ID)
		}
		if err != nil || !reflect.DeepEqual(ids, p.want) {
			t.Errorf("since %d, before %q, at most %d: %v, want %v (%v)", p.since, p.before, p.limit, ids, p.want, err)
		}
	}
}

func TestStanding(t *testing.T) {
	ctx := testContext(t)
	db, folder := open(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(db.CreateOrganization(ctx, Organization{ID: "acme", CreatedAt: moment}))
	for id, expires := range map[string]time.Time{"good": {}, "lasting": moment.Add(time.Millisecond), "expired": moment, "revoked": {}} {
		must(db.CreateCredential(ctx, Credential{ID: id, Kind: APIKey, Hash: []byte(id), Org: "acme", CreatedAt: moment, ExpiresAt: expires}))
	}
	must(db.RevokeCredential(ctx, "acme", "revoked", moment))
	must(db.SuspendUser(ctx, "mallory", moment))
	must(db.SuspendUser(ctx, "bob", moment))
	must(db.ReactivateUser(ctx, "bob"))
	must(db.RevokeToken(ctx, "bad-jti", moment))

	n := int64(0)
	for _, c := range []struct {
		name     string
		requires Standing
		stands   bool
	}{
		{"nothing asked", Standing{}, true},
		{"all good", Standing{Credentials: []string{"good", "lasting"}, User: "alice", Token: "jti"}, true},
		{"reactivated", Standing{User: "bob"}, true},
		{"revoked", Standing{Credentials: []string{"revoked"}}, false},
		{"expired", Standing{Credentials: []string{"expired"}}, false},
		{"unknown", Standing{Credentials: []string{"nobody"}}, false},
		{"second of two", Standing{Credentials: []string{"good", "revoked"}}, false},
		{"suspended", Standing{Credentials: []string{"good"}, User: "mallory"}, false},
		{"suspended, good token", Standing{User: "mallory", Token: "jti"}, false},
		{"token that lasts", Standing{User: "alice", Token: "jti", Expires: moment.Add(time.Millisecond)}, true},
		{"token that has expired", Standing{User: "alice", Token: "jti", Expires: moment}, false},
		{"revoked token", Standing{User: "alice", Token: "bad-jti"}, false},
		{"a jti that is a suspended user's name", Standing{User: "alice", Token: "mallory"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.requires.Now = moment
			n++
			change := full(n, 1)
			change.Requires = c.requires
			if c.stands {
				mustCommit(t, db, change)
			} else {
				refused(t, db, folder, change, ErrRevoked)
			}
		})
	}
}

func TestCommitConflict(t *testing.T) {
	db, folder := open(t)
	mustCommit(t, db, full(1, 1))
	refused(t, db, folder, full(1, 3), event.ErrConflict)
	stale := full(2, 1)
	stale.Appends = append(stale.Appends, appending("lock/1", 0).Appends...) // the second of two
	refused(t, db, folder, stale, event.ErrConflict)
}

func TestUUIDTaken(t *testing.T) {
	db, folder := open(t)
	mustCommit(t, db, full(1, 1))
	taken := full(2, 1)
	taken.Locks[0].UUID = "uuid-1"
	refused(t, db, folder, taken, ErrUUIDTaken)

	mustCommit(t, db, full(1, 2)) // its own is not another's
	renamed := full(1, 3)
	renamed.Locks[0].UUID = "another"
	mustCommit(t, db, renamed)
	mustCommit(t, db, taken) // free now
}

func TestRepeats(t *testing.T) {
	ctx := testContext(t)
	db, folder := open(t)
	first := Change{Remember: []Repeat{remembered(1, 1)}}
	mustCommit(t, db, first)

	again := full(2, 1)
	again.Remember = append(again.Remember, remembered(1, 1))
	refused(t, db, folder, again, ErrRepeat)
	again.Remember[1].Replaces = moment.Add(time.Millisecond) // somebody replaced it meanwhile
	refused(t, db, folder, again, ErrRepeat)
	again.Remember[1].Replaces = moment
	again.Remember[1].CreatedAt = moment.Add(time.Hour)
	again.Remember[1].Status = 200
	mustCommit(t, db, again)
	if r, err := db.Repeat(ctx, first.Remember[0].RepeatKey); err != nil || r.Status != 200 || !r.CreatedAt.Equal(moment.Add(time.Hour)) {
		t.Errorf("replaced: %+v, %v", r, err)
	}
	other := Change{Remember: []Repeat{remembered(1, 1)}}
	other.Remember[0].Caller = "somebody else"
	mustCommit(t, db, other)

	if err := db.ForgetRepeats(ctx, moment.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Repeat(ctx, other.Remember[0].RepeatKey); !errors.Is(err, ErrNotFound) {
		t.Errorf("older than the moment: %v", err)
	}
	if _, err := db.Repeat(ctx, first.Remember[0].RepeatKey); err != nil {
		t.Errorf("as old as the moment: %v", err)
	}
	gone := Change{Remember: []Repeat{other.Remember[0]}}
	gone.Remember[0].Replaces = moment // was swept meanwhile
	mustCommit(t, db, gone)
}

// writes are all the ways in which a change touches the tables, and how to
// tell the change about lock 2 there.
var writes = []struct{ name, when, two string }{
	{"event", "INSERT ON events", "new.stream = 'lock/2'"},
	{"lock", "INSERT ON locks", "new.id = 2"},
	{"command", "INSERT ON commands", "new.lock = 2"},
	{"shadow", "INSERT ON shadows", "new.thing = 'thing-2'"},
	{"remember", "INSERT ON repeats", "new.caller = 'caller-2'"},
	{"forget", "DELETE ON repeats", "old.caller = 'caller-2'"},
}

// TestAllOrNothing breaks a change at each kind of row, in each of the ways in
// which SQLite gives up, with good neighbours in the same batch.
func TestAllOrNothing(t *testing.T) {
	for _, w := range writes {
		for _, how := range []string{"ABORT", "FAIL", "ROLLBACK"} { // undoes the statement, nothing, everything
			t.Run(w.name+" "+how, func(t *testing.T) {
				breakAt(t, `CREATE TRIGGER bad BEFORE `+w.when+` WHEN `+w.two+` BEGIN SELECT RAISE(`+how+`, 'broken on purpose'); END`)
			})
		}
	}
}

func breakAt(t *testing.T, trigger string) {
	db, folder := open(t)
	clean, _ := open(t)
	for n := range int64(4) {
		mustCommit(t, db, full(n, 1))
		mustCommit(t, clean, full(n, 1))
	}
	around := raw(t, folder)
	mustExec(t, around, trigger)

	release := hold(t, db)
	answers := ask(t, db, full(1, 2), full(2, 2), full(3, 2), full(0, 2))
	release()
	for i, a := range answers {
		if err := <-a; (err != nil) != (i == 1) {
			t.Errorf("change %d: %v", i, err)
		}
	}

	mustExec(t, around, `DROP TRIGGER bad`)
	for _, n := range []int64{1, 3, 0} {
		mustCommit(t, clean, full(n, 2))
	}
	if got, want := dump(t, db.read), dump(t, clean.read); got != want {
		t.Errorf("left behind\n%s\nwant\n%s", got, want)
	}
	mustCommit(t, db, full(2, 2)) // it was not the change's fault
}
