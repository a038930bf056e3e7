// Package eventtest is the conformance suite of every event.Log. Engines call
// Run from their own tests; nothing here knows what they are made of.
//
// What the suite holds them to, beyond the words of event.Log: data comes back
// byte for byte, so an engine must not store it in a form that rewrites JSON;
// positions are in commit order across all processes that append; and an
// append that ended in an error was not recorded.
package eventtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/event"
)

// Engine makes a store for one test, empty at first. Each call of open is one
// more process's view of that store, until shut; several may be open at once.
// What was appended through one must be seen by the others and by whoever
// opens the store after all are shut.
type Engine func(t *testing.T) (open func() (log event.Log, shut func()))

// Run holds an engine to the contract of event.Log.
func Run(t *testing.T, engine Engine) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Engine)
	}{
		{"Versions", testVersions},
		{"Conflict", testConflict},
		{"Positions", testPositions},
		{"Exact", testExact},
		{"Durable", testDurable},
		{"Large", testLarge},
		{"Unknown", testUnknown},
		{"StreamPages", testStreamPages},
		{"AfterPages", testAfterPages},
		{"WaitAtOnce", testWaitAtOnce},
		{"WaitWakes", testWaitWakes},
		{"WaitElsewhere", testWaitElsewhere},
		{"WaitEnds", testWaitEnds},
		{"ReadEnds", testReadEnds},
		{"OneWinner", testOneWinner},
		{"WholeWinner", testWholeWinner},
		{"Neighbours", testNeighbours},
		{"Cancelled", testCancelled},
		{"Follow", testFollow},
		{"Model", testModel},
		{"Interleavings", testInterleavings},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, engine) })
	}
}

// patience is how long something may take before it counts as hanging.
const patience = time.Minute

// everything is a limit that no test reaches.
const everything = 1 << 20

// one opens a store that nobody else has open.
func one(t *testing.T, engine Engine) event.Log {
	log, shut := engine(t)()
	t.Cleanup(shut)
	return log
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// tb is what helpers need of a test, be it the go command's or rapid's.
type tb interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// numbered asks for n events that say which place they mean to take.
func numbered(s event.Stream, expect int64, n int) event.Append {
	a := event.Append{Stream: s, Expect: expect, Time: time.UnixMilli(1_780_000_000_000)}
	for v := expect + 1; v <= expect+int64(n); v++ {
		data := json.RawMessage(fmt.Sprintf(`{"stream":%q,"version":%d}`, s, v))
		a.Events = append(a.Events, event.New{Type: "Numbered", Schema: 1, Data: data})
	}
	return a
}

func mustAppend(ctx context.Context, t tb, log event.Log, a event.Append) []event.Record {
	t.Helper()
	records, err := log.Append(ctx, a)
	if err != nil {
		t.Fatalf("append %d events to %s at %d: %v", len(a.Events), a.Stream, a.Expect, err)
	}
	if d := differ(records, wanted(a, records)); d != "" {
		t.Fatalf("append to %s at %d: answered %s", a.Stream, a.Expect, d)
	}
	return records
}

// wanted is what an append should answer, with the positions it did answer.
func wanted(a event.Append, answered []event.Record) (all []event.Record) {
	for i, e := range a.Events {
		r := event.Record{Stream: a.Stream, Version: a.Expect + int64(i) + 1, Org: a.Org, Time: a.Time.UTC().Truncate(time.Millisecond), New: e}
		if i < len(answered) {
			r.Position = answered[i].Position
		}
		all = append(all, r)
	}
	return all
}

func mustStream(ctx context.Context, t tb, log event.Log, s event.Stream, from int64, limit int) []event.Record {
	t.Helper()
	records, err := log.Stream(ctx, s, from, limit)
	if err != nil {
		t.Fatalf("read %s from %d, at most %d: %v", s, from, limit, err)
	}
	return records
}

func mustAfter(ctx context.Context, t tb, log event.Log, p event.Position, limit int) []event.Record {
	t.Helper()
	records, err := log.After(ctx, p, limit)
	if err != nil {
		t.Fatalf("read after %d, at most %d: %v", p, limit, err)
	}
	return records
}

func mustBeSame(t tb, what string, got, want []event.Record) {
	t.Helper()
	if d := differ(got, want); d != "" {
		t.Fatalf("%s: %s", what, d)
	}
}

// differ says how records differ, "" when they do not.
func differ(got, want []event.Record) string {
	for i := range min(len(got), len(want)) {
		if !same(got[i], want[i]) {
			return fmt.Sprintf("record %d of %d is\n%s, want\n%s", i+1, len(want), show(got[i]), show(want[i]))
		}
	}
	if len(got) != len(want) {
		return fmt.Sprintf("%d records, want %d", len(got), len(want))
	}
	return ""
}

func same(a, b event.Record) bool {
	return a.Position == b.Position && a.Stream == b.Stream && a.Version == b.Version && a.Org == b.Org &&
		a.Time.Equal(b.Time) && a.Time.Location() == b.Time.Location() &&
		a.Type == b.Type && a.Schema == b.Schema && a.Meta == b.Meta && bytes.Equal(a.Data, b.Data)
}

func show(r event.Record) string {
	s := fmt.Sprintf("%+v data %s", r, r.Data)
	return s[:min(len(s), 1000)]
}

// inParallel runs n functions at once and waits for all; each has its own error.
func inParallel(n int, f func(i int) error) []error {
	errs := make([]error, n)
	start := make(chan struct{})
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			<-start
			errs[i] = f(i)
		})
	}
	close(start)
	all.Wait()
	return errs
}

func testVersions(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	var all []event.Record
	for _, n := range []int{1, 3, 1, 2} {
		all = append(all, mustAppend(ctx, t, log, numbered("lock/1", int64(len(all)), n))...)
	}
	mustAppend(ctx, t, log, numbered("lock/2", 0, 1)) // each stream counts for itself
	for i, r := range all {
		if r.Version != int64(i)+1 {
			t.Errorf("record %d has version %d", i+1, r.Version)
		}
	}
	mustBeSame(t, "stream", mustStream(ctx, t, log, "lock/1", 1, everything), all)
}

func testConflict(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	mustAppend(ctx, t, log, numbered("lock/1", 0, 3))
	before := mustAfter(ctx, t, log, 0, everything)
	for _, c := range []struct {
		name   string
		stream event.Stream
		expect int64
		n      int
	}{
		{"must not exist but does", "lock/1", 0, 1},
		{"too low", "lock/1", 2, 1},
		{"too low, several", "lock/1", 2, 3},
		{"too high", "lock/1", 4, 1},
		{"too high, several", "lock/1", 4, 3},
		{"must exist but does not", "lock/2", 1, 1},
		{"another stream's version", "lock/2", 3, 1},
		{"a prefix of another's name", "lock/", 3, 1},
	} {
		records, err := log.Append(ctx, numbered(c.stream, c.expect, c.n))
		if !errors.Is(err, event.ErrConflict) || records != nil {
			t.Errorf("%s: %v and %d records, want ErrConflict and none", c.name, err, len(records))
		}
		mustBeSame(t, c.name, mustAfter(ctx, t, log, 0, everything), before)
	}
	mustAppend(ctx, t, log, numbered("lock/1", 3, 1)) // no conflict left a mark
}

func testPositions(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	var all []event.Record
	for v := range int64(4) {
		for _, s := range []event.Stream{"lock/2", "lock/1", "lock/3"} {
			all = append(all, mustAppend(ctx, t, log, numbered(s, 2*v, 2))...)
		}
	}
	last := event.Position(0)
	for _, r := range all {
		if r.Position <= last {
			t.Fatalf("position %d comes after %d", r.Position, last)
		}
		last = r.Position
	}
	mustBeSame(t, "after 0", mustAfter(ctx, t, log, 0, everything), all)
}

// curious are events whose bytes an engine might be tempted to tidy up.
func curious() event.Append {
	a := event.Append{
		Stream: `lock/ü "1" \ %_ '; 🔑`, Org: "Änderungs-GmbH & Söhne <ümlaut> 株式会社",
		Time: time.Date(2026, 5, 29, 14, 0, 0, 123_999_999, time.FixedZone("east", 2*60*60)),
	}
	for i, data := range []string{
		`{"b":1,"a":2,"b":3}`, // order and repetition
		"{ \"spaces\" :\t[ 1 , 2 ]\n}",
		`{"n":[1.0,1e2,-0,12345678901234567890,0.1000]}`,
		`{"s":"\u0000 \ud83d\udd11 \/ é é 🔑 ` + "\u2028" + ` <&>"}`,
		`{}`, `null`, `""`, `0`,
	} {
		a.Events = append(a.Events, event.New{Type: fmt.Sprintf("Type%dÜ", i), Schema: i + 1, Data: json.RawMessage(data), Meta: event.Meta{
			Actor: "user:ü🔑", Org: a.Org, Credential: "key:a'b\"c\\d", Right: "owner", Remote: "[::1]:1", Agent: "curl <&> \u2028\t\n",
			Why: "because 'x'; DROP TABLE events; --", Request: "r", Command: "c", IssuedAt: 1<<53 + 1, ExpiresAt: -1,
		}})
	}
	a.Events = append(a.Events, event.New{Type: "NoMeta", Schema: 1, Data: json.RawMessage(`{}`)})
	return a
}

func testExact(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	a := curious()
	records := mustAppend(ctx, t, log, a)
	mustBeSame(t, "stream", mustStream(ctx, t, log, a.Stream, 1, everything), records)
	mustBeSame(t, "after", mustAfter(ctx, t, log, 0, everything), records)
	if at := records[0].Time.Format(time.RFC3339Nano); at != "2026-05-29T12:00:00.123Z" {
		t.Errorf("time is %s, want UTC, cut to milliseconds", at)
	}
	old := numbered("lock/old", 0, 1)
	old.Time = time.Date(1969, 12, 31, 23, 59, 59, 998_500_000, time.UTC) // before the epoch cutting goes the other way
	records = mustAppend(ctx, t, log, old)
	mustBeSame(t, "before 1970", mustStream(ctx, t, log, old.Stream, 1, 1), records)
}

func testDurable(t *testing.T, engine Engine) {
	ctx, open := testContext(t), engine(t)
	var all []event.Record
	for version := range int64(3) {
		log, shut := open()
		mustBeSame(t, "opened anew", mustAfter(ctx, t, log, 0, everything), all)
		all = append(all, mustAppend(ctx, t, log, numbered("lock/1", version, 1))...)
		if version == 0 {
			all = append(all, mustAppend(ctx, t, log, curious())...)
		}
		shut()
	}
	log, shut := open()
	defer shut()
	mustBeSame(t, "opened at last", mustAfter(ctx, t, log, 0, everything), all)
}

func testLarge(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	all := mustAppend(ctx, t, log, numbered("lock/many", 0, 2000))
	big := numbered("lock/big", 0, 1)
	big.Events[0].Data = json.RawMessage(`"` + strings.Repeat("ü🔑 ", 1<<18) + `"`)
	all = append(all, mustAppend(ctx, t, log, big)...)
	mustBeSame(t, "after", mustAfter(ctx, t, log, 0, everything), all)
	if _, err := log.Append(ctx, numbered("lock/many", 1999, 2000)); !errors.Is(err, event.ErrConflict) {
		t.Errorf("many events at the wrong version: %v", err)
	}
}

func testUnknown(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	mustBeSame(t, "empty log", mustAfter(ctx, t, log, 0, everything), nil)
	mustAppend(ctx, t, log, numbered("lock/10", 0, 2))
	for _, s := range []event.Stream{"lock/1", "lock/100", "LOCK/10", "lock/%", "lock/1_", "", "lock/10 "} {
		mustBeSame(t, fmt.Sprintf("stream %q", s), mustStream(ctx, t, log, s, 1, everything), nil)
	}
}

func testStreamPages(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	mustAppend(ctx, t, log, numbered("lock/2", 0, 3))
	all := mustAppend(ctx, t, log, numbered("lock/1", 0, 5))
	mustAppend(ctx, t, log, numbered("lock/2", 3, 3))
	for from := range int64(8) {
		for limit := 1; limit <= 6; limit++ {
			want := all[min(max(from, 1)-1, 5):]
			got := mustStream(ctx, t, log, "lock/1", from, limit)
			mustBeSame(t, fmt.Sprintf("from %d, at most %d", from, limit), got, want[:min(limit, len(want))])
		}
	}
}

func testAfterPages(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	var all []event.Record
	for i := range int64(5) {
		all = append(all, mustAppend(ctx, t, log, numbered(event.Stream(fmt.Sprint("lock/", i%2)), i/2, 1))...)
	}
	for seen := range len(all) + 1 {
		p := event.Position(0)
		if seen > 0 {
			p = all[seen-1].Position
		}
		for limit := 1; limit <= 6; limit++ {
			want := all[seen:]
			got := mustAfter(ctx, t, log, p, limit)
			mustBeSame(t, fmt.Sprintf("after %d, at most %d", p, limit), got, want[:min(limit, len(want))])
		}
	}
	mustBeSame(t, "after the end", mustAfter(ctx, t, log, all[4].Position+1000, 1), nil)
}
