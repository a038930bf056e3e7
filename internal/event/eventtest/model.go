package eventtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/event"
	"pgregory.net/rapid"
)

// model is a log of which a slice says what it should hold behind a position.
type model struct {
	ctx    context.Context
	open   func() (event.Log, func())
	log    event.Log
	shut   func()
	prefix string // of streams, so that each run has its own
	start  event.Position
	all    []event.Record
}

// testModel compares an engine with a slice, over random operations. What
// failed is printed with the seed that repeats it.
func testModel(t *testing.T, engine Engine) {
	m := &model{ctx: testContext(t), open: engine(t)}
	m.log, m.shut = m.open()
	defer func() { m.shut() }()
	run := 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		m.begin(t, fmt.Sprint(run, "/"))
		t.Repeat(map[string]func(*rapid.T){
			"append": m.append,
			"stream": m.stream,
			"after":  m.after,
			"wait":   m.wait,
			"reopen": m.reopen,
		})
	})
}

// begin forgets what runs before this one left in the log.
func (m *model) begin(t tb, prefix string) {
	for _, r := range mustAfter(m.ctx, t, m.log, m.start, everything) {
		m.start = r.Position
	}
	m.prefix, m.all = prefix, nil
}

var (
	streams = rapid.Map(rapid.IntRange(1, 3), func(n int) event.Stream { return event.Stream(fmt.Sprint("lock/", n)) })
	events  = rapid.SliceOfN(rapid.Custom(drawEvent), 1, 4)
)

func drawEvent(t *rapid.T) event.New {
	data, err := json.Marshal(map[string]string{rapid.String().Draw(t, "name"): rapid.String().Draw(t, "value")})
	if err != nil {
		t.Fatal(err)
	}
	return event.New{
		Type: rapid.StringMatching(`[A-Z][a-zA-Z]{0,20}`).Draw(t, "type"), Schema: rapid.IntRange(1, 9).Draw(t, "schema"), Data: data,
		Meta: event.Meta{Actor: rapid.String().Draw(t, "actor"), Why: rapid.String().Draw(t, "why"), IssuedAt: rapid.Int64().Draw(t, "issued")},
	}
}

func (m *model) drawStream(t *rapid.T) event.Stream {
	return event.Stream(m.prefix) + streams.Draw(t, "stream")
}

func (m *model) of(s event.Stream) (records []event.Record) {
	for _, r := range m.all {
		if r.Stream == s {
			records = append(records, r)
		}
	}
	return records
}

func (m *model) append(t *rapid.T) {
	s := m.drawStream(t)
	version := int64(len(m.of(s)))
	expect := max(0, version+rapid.SampledFrom([]int64{0, 0, 0, 0, -1, 1, 5, -version}).Draw(t, "off by"))
	a := event.Append{
		Stream: s, Expect: expect, Org: rapid.SampledFrom([]string{"", "acme", "ümlaut"}).Draw(t, "org"),
		Time: time.UnixMicro(rapid.Int64Range(0, 1<<51).Draw(t, "time")), Events: events.Draw(t, "events"),
	}
	if expect == version {
		m.all = append(m.all, mustAppend(m.ctx, t, m.log, a)...)
		return
	}
	if _, err := m.log.Append(m.ctx, a); !errors.Is(err, event.ErrConflict) {
		t.Fatalf("append to %s at %d, which is at %d: %v", s, expect, version, err)
	}
}

func (m *model) stream(t *rapid.T) {
	s, limit := m.drawStream(t), rapid.IntRange(1, 50).Draw(t, "limit")
	want := m.of(s)
	from := rapid.IntRange(1, len(want)+2).Draw(t, "from")
	want = want[min(from-1, len(want)):]
	mustBeSame(t, "stream", mustStream(m.ctx, t, m.log, s, int64(from), limit), want[:min(limit, len(want))])
}

// cursor draws a position and answers with what is behind it.
func (m *model) cursor(t *rapid.T) (event.Position, []event.Record) {
	seen := rapid.IntRange(0, len(m.all)).Draw(t, "seen")
	if seen == 0 {
		return m.start, m.all
	}
	return m.all[seen-1].Position, m.all[seen:]
}

func (m *model) after(t *rapid.T) {
	p, want := m.cursor(t)
	limit := rapid.IntRange(1, 50).Draw(t, "limit")
	mustBeSame(t, "after", mustAfter(m.ctx, t, m.log, p, limit), want[:min(limit, len(want))])
}

func (m *model) wait(t *rapid.T) {
	p, behind := m.cursor(t)
	if len(behind) > 0 {
		if err := m.log.Wait(m.ctx, p); err != nil {
			t.Fatalf("wait behind %d, where there are %d records: %v", p, len(behind), err)
		}
		return
	}
	over, cancel := context.WithCancel(m.ctx)
	cancel()
	if err := m.log.Wait(over, p); !errors.Is(err, context.Canceled) {
		t.Fatalf("wait at the end, given up: %v", err)
	}
}

func (m *model) reopen(t *rapid.T) {
	m.shut()
	m.log, m.shut = m.open()
	mustBeSame(t, "opened anew", mustAfter(m.ctx, t, m.log, m.start, everything), m.all)
}

// step is what one of several concurrent callers does next: read a stream's
// version and append n events at that version or beside it.
type step struct {
	stream event.Stream
	offset int64
	n      int
}

func drawStep(t *rapid.T) step {
	return step{streams.Draw(t, "stream"), rapid.SampledFrom([]int64{0, 0, 0, -1, 1}).Draw(t, "off by"), rapid.IntRange(1, 3).Draw(t, "events")}
}

// testInterleavings runs random callers against each other and asks whether
// what they were told can be true.
func testInterleavings(t *testing.T, engine Engine) {
	ctx, log := testContext(t), one(t, engine)
	plans := rapid.SliceOfN(rapid.SliceOfN(rapid.Custom(drawStep), 1, 8), 2, 6)
	round, p := 0, event.Position(0)
	rapid.Check(t, func(t *rapid.T) {
		round++
		plan := plans.Draw(t, "plan")
		calls := play(ctx, t, log, fmt.Sprint(round, "/"), plan)
		all := mustAfter(ctx, t, log, p, everything)
		if len(all) > 0 {
			p = all[len(all)-1].Position
		}
		mustCount(t, all)
		if err := judge(calls, all); err != nil {
			t.Fatalf("%v", err)
		}
	})
}

func play(ctx context.Context, t tb, log event.Log, prefix string, plan [][]step) (calls []call) {
	t.Helper()
	var clock atomic.Int64
	made := make([][]call, len(plan))
	errs := inParallel(len(plan), func(i int) error {
		for _, s := range plan[i] {
			stream := event.Stream(prefix) + s.stream
			known, err := log.Stream(ctx, stream, 1, everything)
			if err != nil {
				return err
			}
			c := call{before: int64(len(known)), begin: clock.Add(1)}
			c.append = numbered(stream, max(0, c.before+s.offset), s.n)
			c.records, c.err = log.Append(ctx, c.append)
			c.end = clock.Add(1)
			made[i] = append(made[i], c)
		}
		return nil
	})
	if err := errors.Join(errs...); err != nil {
		t.Fatalf("read: %v", err)
	}
	for _, m := range made {
		calls = append(calls, m...)
	}
	return calls
}
