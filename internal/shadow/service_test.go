package shadow_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/shadow"
)

// world is a service whose storage, bus and clock are in memory.
type world struct {
	*shadow.Service
	t testing.TB

	mu           sync.Mutex
	wall, steady time.Time
	docs         map[shadow.Address][]byte
	sent         []sent
	offline      bool                              // the thing has no session
	deaf         func(topic string) bool           // the session would not receive a topic with QoS 1
	saving       func([]shadow.Row) error          // called before rows are durable
	reporting    func(string, shadow.Report) error // called with every report
	reports      []shadow.Report
}

// sent is what went to the bus.
type sent struct {
	topic string // below the shadow
	body  string
	until clock.Deadline // of a command
	acked func()
}

// thing is what the tests are about, and start is when.
const thing = "T"

var (
	classic = shadow.Address{Thing: thing}
	start   = time.Unix(1_800_000_000, 0).UTC()
)

func newWorld(t testing.TB) *world {
	w := &world{t: t, wall: start, steady: start, docs: map[shadow.Address][]byte{}}
	c := clock.Clock{
		Wall:   func() time.Time { w.mu.Lock(); defer w.mu.Unlock(); return w.wall },
		Steady: func() time.Time { w.mu.Lock(); defer w.mu.Unlock(); return w.steady },
	}
	w.Service = shadow.NewService(w, w, c, slog.New(slog.DiscardHandler), w.report)
	return w
}

func (w *world) LoadShadow(_ context.Context, a shadow.Address) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	b, ok := w.docs[a]
	if !ok {
		return nil, shadow.ErrNoDocument
	}
	return b, nil
}

func (w *world) SaveShadows(_ context.Context, rows ...shadow.Row) error {
	if w.saving != nil {
		if err := w.saving(rows); err != nil {
			return err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range rows {
		w.docs[shadow.Address{Thing: r.Thing, Name: r.Name}] = r.Document
	}
	return nil
}

func (w *world) Publish(topic string, payload []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent = append(w.sent, sent{topic: strings.TrimPrefix(topic, classic.Prefix()+"/"), body: string(payload)})
}

func (w *world) Present(string) bool { return !w.offline }

func (w *world) Command(_, topic string, payload []byte, until clock.Deadline, acked func()) error {
	if w.offline || w.deaf != nil && w.deaf(topic) {
		return shadow.ErrOffline
	}
	w.Publish(topic, payload)
	w.mu.Lock()
	defer w.mu.Unlock()
	last := &w.sent[len(w.sent)-1]
	last.until, last.acked = until, acked
	return nil
}

func (w *world) report(_ context.Context, thing string, r shadow.Report) error {
	w.reports = append(w.reports, r)
	if w.reporting != nil {
		return w.reporting(thing, r)
	}
	return nil
}

func (w *world) step(wall, steady time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wall, w.steady = w.wall.Add(wall), w.steady.Add(steady)
}

// ask handles a device's own request and answers with what was sent.
func (w *world) ask(op shadow.Operation, payload string) []sent {
	w.t.Helper()
	return w.askAs(thing, classic, op, payload)
}

func (w *world) askAs(from string, a shadow.Address, op shadow.Operation, payload string) []sent {
	w.t.Helper()
	w.take()
	w.Handle(w.t.Context(), from, a, op, []byte(payload))
	return w.take()
}

// take answers with what was sent since it was last called.
func (w *world) take() []sent {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.sent
	w.sent = nil
	return s
}

// stored says what a shadow's row holds.
func (w *world) stored() shadow.Document {
	w.t.Helper()
	d, err := shadow.DecodeDocument(w.docs[classic])
	must(w.t, err)
	return d
}

// command is one that lives for a span from now.
func (w *world) command(id string, life time.Duration) shadow.Command {
	w.mu.Lock()
	defer w.mu.Unlock()
	return shadow.Command{
		ID: id, IssuedAt: w.wall, Until: clock.Deadline{Wall: w.wall.Add(life), Steady: w.steady.Add(life)}, Acked: func() {},
	}
}

// open stages a command, records and sends it.
func (w *world) open(id string) {
	w.t.Helper()
	g, err := w.Stage(w.t.Context(), thing, w.command(id, 10*time.Second))
	must(w.t, err)
	must(w.t, w.SaveShadows(w.t.Context(), g.Row()))
	must(w.t, g.Send())
}

// withdraw takes a command back and records it.
func (w *world) withdraw(id string) {
	w.t.Helper()
	g, err := w.Withdraw(w.t.Context(), thing, id)
	must(w.t, err)
	if g == nil {
		w.t.Fatalf("nothing to withdraw of %s", id)
	}
	must(w.t, w.SaveShadows(w.t.Context(), g.Row()))
	must(w.t, g.Send())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func topics(all []sent) (t []string) {
	for _, s := range all {
		t = append(t, s.topic)
	}
	return t
}

func wantTopics(t testing.TB, got []sent, want ...string) {
	t.Helper()
	if !slices.Equal(topics(got), want) {
		t.Fatalf("sent %v, want %v", topics(got), want)
	}
}

// wantRejected is for one answer, with a code and the token.
func wantRejected(t testing.TB, got []sent, topic string, code int, token string) {
	t.Helper()
	wantTopics(t, got, topic+"/rejected")
	var body struct {
		Code        int
		Message     string
		ClientToken string
		Timestamp   int64
	}
	must(t, json.Unmarshal([]byte(got[0].body), &body))
	if body.Code != code || body.ClientToken != token || body.Message == "" || body.Timestamp != start.Unix() {
		t.Errorf("rejected with %s, want %d for %q", got[0].body, code, token)
	}
}

func wantBody(t testing.TB, s sent, body string) {
	t.Helper()
	want(t, []byte(s.body), body)
}

// shows says whether a body tells of a command.
func (s sent) shows(id string) bool { return strings.Contains(s.body, `"`+id+`"`) }

// P/update: accepted, then the delta if there is one, then documents; each as
// the tables say.
func TestUpdateAnswers(t *testing.T) {
	w := newWorld(t)
	got := w.ask(shadow.OpUpdate, `{"state":{"desired":{"a":1},"reported":{"b":[true]}},"clientToken":"t","thingName":"T"}`)
	wantTopics(t, got, "update/accepted", "update/delta", "update/documents")
	wantBody(t, got[0], `{"state":{"desired":{"a":1},"reported":{"b":[true]}},"metadata":{"desired":{"a":{"timestamp":1800000000}},"reported":{"b":[{"timestamp":1800000000}]}},"version":1,"timestamp":1800000000,"clientToken":"t"}`)
	wantBody(t, got[1], `{"state":{"a":1},"metadata":{"a":{"timestamp":1800000000}},"version":1,"timestamp":1800000000,"clientToken":"t"}`)
	wantBody(t, got[2], `{"current":{"state":{"desired":{"a":1},"reported":{"b":[true]}},"metadata":{"desired":{"a":{"timestamp":1800000000}},"reported":{"b":[{"timestamp":1800000000}]}},"version":1},"timestamp":1800000000,"clientToken":"t"}`)

	w.step(time.Second, time.Second)
	got = w.ask(shadow.OpUpdate, `{"state":{"reported":{"a":1,"b":null}}}`)
	wantTopics(t, got, "update/accepted", "update/documents") // no difference is left
	wantBody(t, got[0], `{"state":{"reported":{"a":1,"b":null}},"metadata":{"reported":{"a":{"timestamp":1800000001},"b":{"timestamp":1800000001}}},"version":2,"timestamp":1800000001}`)

	got = w.ask(shadow.OpGet, `{"clientToken":"g"}`)
	wantTopics(t, got, "get/accepted")
	wantBody(t, got[0], `{"state":{"desired":{"a":1},"reported":{"a":1}},"metadata":{"desired":{"a":{"timestamp":1800000000}},"reported":{"a":{"timestamp":1800000001}}},"version":2,"timestamp":1800000001,"clientToken":"g"}`)
}

// Accepted and documents are of one moment, however long the disk takes.
func TestUpdateIsOfOneMoment(t *testing.T) {
	w := newWorld(t)
	w.saving = func([]shadow.Row) error { w.step(time.Hour, time.Hour); return nil }
	for _, s := range w.ask(shadow.OpUpdate, `{"state":{"desired":{"a":1}}}`) {
		if strings.Count(s.body, `"timestamp":1800000000`) < 2 || strings.Contains(s.body, "1800003600") {
			t.Errorf("%s: %s", s.topic, s.body)
		}
	}
}

// Named shadows have a document and a prefix of their own, and no commands.
func TestNamedShadow(t *testing.T) {
	w := newWorld(t)
	a := shadow.Address{Thing: thing, Name: "n"}
	w.open("c1")
	got := w.askAs(thing, a, shadow.OpUpdate, `{"state":{"desired":{"open":["c1",1,2]},"reported":{"openResult":7}}}`)
	wantTopics(t, got, "name/n/update/accepted", "name/n/update/delta", "name/n/update/documents")
	wantTopics(t, w.askAs(thing, a, shadow.OpGet, ``), "name/n/get/accepted")
	if len(w.reports) > 0 {
		t.Errorf("a named shadow reported %+v", w.reports)
	}
	wantRejected(t, w.askAs(thing, shadow.Address{Thing: thing, Name: "other"}, shadow.OpGet, ``), "name/other/get", 404, "")
}

// Version: a supplied one must be the current one, else 409 and nothing changes.
func TestVersionConflict(t *testing.T) {
	w := newWorld(t)
	wantTopics(t, w.ask(shadow.OpUpdate, `{"state":{"reported":{"a":1}},"version":0}`), "update/accepted", "update/documents")
	wantRejected(t, w.ask(shadow.OpUpdate, `{"state":{"reported":{"a":2}},"version":0,"clientToken":"t"}`), "update", 409, "t")
	wantRejected(t, w.ask(shadow.OpUpdate, `{"state":{"reported":{"a":2}},"version":2,"clientToken":"t"}`), "update", 409, "t")
	wantState(t, w.stored(), `{"reported":{"a":1}}`)
	wantTopics(t, w.ask(shadow.OpUpdate, `{"state":{"reported":{"a":2}},"version":1}`), "update/accepted", "update/documents")
}

// Delete answers with the version, which a new shadow continues.
func TestDeleteKeepsTheVersion(t *testing.T) {
	w := newWorld(t)
	wantRejected(t, w.ask(shadow.OpDelete, `{"clientToken":"t"}`), "delete", 404, "t")
	wantRejected(t, w.ask(shadow.OpGet, `{"clientToken":"t"}`), "get", 404, "t")
	w.ask(shadow.OpUpdate, `{"state":{"reported":{"a":1}}}`)
	got := w.ask(shadow.OpDelete, `{"clientToken":"t"}`)
	wantTopics(t, got, "delete/accepted")
	wantBody(t, got[0], `{"version":1,"timestamp":1800000000,"clientToken":"t"}`)
	wantRejected(t, w.ask(shadow.OpGet, ``), "get", 404, "")
	got = w.ask(shadow.OpUpdate, `{"state":{"reported":{"b":1}}}`)
	wantTopics(t, got, "update/accepted", "update/documents")
	if strings.Contains(got[1].body, "previous") || !strings.Contains(got[1].body, `"version":2`) {
		t.Errorf("documents of a shadow made anew: %s", got[1].body)
	}
}

// Way of one open, 2: the command goes to the delta alone, as an array, with
// its deadline. The documents that follow do not hold it.
func TestCommandIsSent(t *testing.T) {
	w := newWorld(t)
	w.ask(shadow.OpUpdate, `{"state":{"reported":{"lock":"locked"}}}`)
	w.take()
	var acked int
	c := w.command("c1", 10*time.Second)
	c.Acked = func() { acked++ }
	g, err := w.Stage(t.Context(), thing, c)
	must(t, err)
	if len(w.take()) > 0 {
		t.Error("something was sent before it was recorded")
	}
	must(t, w.SaveShadows(t.Context(), g.Row()))
	must(t, g.Send())
	got := w.take()
	wantTopics(t, got, "update/delta", "update/documents")
	array := `["c1",1800000000000,1800000010000]`
	wantBody(t, got[0], `{"state":{"open":`+array+`},"metadata":{"open":[{"timestamp":1800000000},{"timestamp":1800000000},{"timestamp":1800000000}]},"version":2,"timestamp":1800000000}`)
	if got[0].until != c.Until {
		t.Errorf("deadline %+v, want %+v", got[0].until, c.Until)
	}
	got[0].acked()
	if acked != 1 || got[1].acked != nil || got[1].shows("c1") {
		t.Error("the device's acknowledgement of the delta, and of nothing else, is the command's")
	}
	raw, _ := w.stored().Desired("open")
	want(t, raw, array)

	w.withdraw("c1")
	got = w.take()
	wantTopics(t, got, "update/documents")
	if got[0].shows("c1") {
		t.Errorf("documents: %s", got[0].body)
	}
	wantState(t, w.stored(), `{"reported":{"lock":"locked"}}`)
}

// Only control writes desired.open: any other update that touches it is
// answered 403, and nothing is stored.
func TestOnlyStageWritesTheCommand(t *testing.T) {
	w := newWorld(t)
	for _, state := range []string{
		`{"desired":{"open":["evil",1,2]}}`, `{"desired":{"open":null}}`, `{"desired":{"open":true,"a":1},"reported":{"a":1}}`,
		`{"desired":{"open":{}}}`,
	} {
		for _, from := range []string{thing, "other", ""} {
			got := w.askAs(from, classic, shadow.OpUpdate, `{"state":`+state+`,"clientToken":"t"}`)
			wantRejected(t, got, "update", 403, "t")
		}
	}
	if len(w.docs) > 0 {
		t.Errorf("stored: %s", w.docs[classic])
	}
	// Other names are other fields: JSON's are compared exactly.
	wantTopics(t, w.ask(shadow.OpUpdate, `{"state":{"desired":{"Open":1,"a":{"open":1}}}}`), "update/accepted", "update/delta", "update/documents")
}

// desired: null clears every field, and so also the command.
func TestDesiredNull(t *testing.T) {
	w := newWorld(t)
	drop := `{"state":{"desired":null},"clientToken":"t"}`
	wantTopics(t, w.ask(shadow.OpUpdate, drop), "update/accepted", "update/documents")
	w.ask(shadow.OpUpdate, `{"state":{"desired":{"a":1}}}`)
	w.open("c1")
	wantRejected(t, w.ask(shadow.OpUpdate, drop), "update", 403, "t")
	w.withdraw("c1")
	wantTopics(t, w.ask(shadow.OpUpdate, drop), "update/accepted", "update/documents")
}

// reported.open and reported.openResult are accepted only from that thing's own
// connection.
func TestOnlyTheDeviceReports(t *testing.T) {
	w := newWorld(t)
	result := `{"id":"c1","result":"opened","at":1800000001000,"reason":null}`
	for _, reported := range []string{`{"open":["c1",1,2]}`, `{"openResult":` + result + `}`, `{"openResult":null}`, `{"open":null}`, `null`} {
		for _, from := range []string{"other", ""} {
			got := w.askAs(from, classic, shadow.OpUpdate, `{"state":{"reported":`+reported+`},"clientToken":"t"}`)
			wantRejected(t, got, "update", 403, "t")
		}
	}
	if len(w.reports) > 0 || len(w.docs) > 0 {
		t.Fatalf("another's report was heard: %+v, stored %s", w.reports, w.docs[classic])
	}
	wantTopics(t, w.askAs("other", classic, shadow.OpUpdate, `{"state":{"reported":{"battery":1}}}`), "update/accepted", "update/documents")

	w.ask(shadow.OpUpdate, `{"state":{"reported":{"open":["c1",1,2],"openResult":`+result+`}}}`)
	if want := (shadow.Report{ID: "c1", Result: "opened", At: 1800000001000}); len(w.reports) != 1 || w.reports[0] != want {
		t.Errorf("reports %+v", w.reports)
	}
	wantTopics(t, w.ask(shadow.OpUpdate, `{"state":{"reported":null}}`), "update/accepted", "update/documents")
	if len(w.reports) != 1 {
		t.Errorf("a deletion is no report: %+v", w.reports)
	}
}

// A malformed openResult is answered 400: it is no outcome, and is not stored.
func TestMalformedReport(t *testing.T) {
	w := newWorld(t)
	long := strings.Repeat("x", 129)
	for _, result := range []string{
		`"opened"`, `[]`, `{}`, `{"id":"c1"}`, `{"result":"opened","at":1}`, `{"id":"c1","result":"OPENED","at":1}`,
		`{"id":"c1","result":"expired","at":1}`, `{"id":7,"result":"opened","at":1}`, `{"id":"c1","result":"opened","at":"now"}`,
		`{"id":"c1","result":"failed","at":1,"reason":"` + long + `"}`, `{"id":"` + long + `","result":"opened","at":1}`,
		`{"id":"c1","result":"failed","at":1,"reason":{"a":1}}`,
	} {
		got := w.ask(shadow.OpUpdate, `{"state":{"reported":{"openResult":`+result+`}},"clientToken":"t"}`)
		wantRejected(t, got, "update", 400, "t")
	}
	if len(w.reports) > 0 || len(w.docs) > 0 {
		t.Errorf("heard %+v, stored %s", w.reports, w.docs[classic])
	}
}

// If an outcome cannot be recorded, the device's update is rejected 500 and
// nothing is stored, so that the device reports again.
func TestReportThatCannotBeRecorded(t *testing.T) {
	w := newWorld(t)
	w.reporting = func(string, shadow.Report) error { return errors.New("disk full") }
	report := `{"state":{"reported":{"openResult":{"id":"c1","result":"opened","at":1}}},"clientToken":"t"}`
	wantRejected(t, w.ask(shadow.OpUpdate, report), "update", 500, "t")
	if len(w.docs) > 0 {
		t.Errorf("stored: %s", w.docs[classic])
	}
	w.reporting = nil
	wantTopics(t, w.ask(shadow.OpUpdate, report), "update/accepted", "update/documents")
}

// What cannot be stored is rejected 500, and nothing is published of it.
func TestUpdateThatCannotBeStored(t *testing.T) {
	w := newWorld(t)
	w.ask(shadow.OpUpdate, `{"state":{"reported":{"a":1}}}`)
	w.saving = func([]shadow.Row) error { return errors.New("disk full") }
	wantRejected(t, w.ask(shadow.OpUpdate, `{"state":{"desired":{"a":2}},"clientToken":"t"}`), "update", 500, "t")
	wantRejected(t, w.ask(shadow.OpDelete, `{"clientToken":"t"}`), "delete", 500, "t")
	wantState(t, w.stored(), `{"reported":{"a":1}}`)
}

// A live command is shown in get and in the delta of whatever the device
// updates, with the deadline that it has; the messages are resent to nobody
// after that.
func TestLiveCommandIsShownWithItsDeadline(t *testing.T) {
	w := newWorld(t)
	w.ask(shadow.OpUpdate, `{"state":{"desired":{"volume":3}}}`)
	w.open("c1")
	until := w.take()[0].until
	got := w.ask(shadow.OpGet, ``)
	if !got[0].shows("c1") || got[0].until != until || got[0].acked != nil {
		t.Errorf("get: %+v", got)
	}
	got = w.ask(shadow.OpUpdate, `{"state":{"reported":{"battery":9}},"clientToken":"t"}`)
	wantTopics(t, got, "update/accepted", "update/delta", "update/documents")
	if !got[1].shows("c1") || got[1].until != until || got[1].acked != nil {
		t.Errorf("delta: %+v", got[1])
	}

	// Who cannot be held to a deadline is told all but the command.
	w.deaf = func(string) bool { return true }
	for _, got := range [][]sent{w.ask(shadow.OpGet, ``), w.ask(shadow.OpUpdate, `{"state":{"reported":{"battery":8}}}`)[1:2]} {
		if len(got) != 1 || got[0].shows("c1") || !strings.Contains(got[0].body, "volume") {
			t.Errorf("a session without QoS 1 got %+v", got)
		}
	}
}

// Every shadow get leaves out a command whose time is over by either clock,
// that was withdrawn, or that this process did not stage itself, even if
// clearing it failed. So does every delta and document.
func TestDeadCommandIsShownToNobody(t *testing.T) {
	deaths := map[string]func(*world) *world{
		"wall":   func(w *world) *world { w.step(10*time.Second, 0); return w },
		"steady": func(w *world) *world { w.step(-time.Hour, 10*time.Second); return w },
		"withdrawn, not recorded": func(w *world) *world {
			g, err := w.Withdraw(w.t.Context(), thing, "c1")
			must(w.t, err)
			g.Drop()
			return w
		},
		"withdrawal failed": func(w *world) *world {
			docs := w.docs
			w.docs = map[shadow.Address][]byte{classic: []byte("unreadable")}
			if _, err := w.Withdraw(w.t.Context(), thing, "c1"); err == nil {
				w.t.Error("Withdraw read the unreadable")
			}
			w.docs = docs
			return w
		},
		"another process": func(w *world) *world {
			next := newWorld(w.t)
			next.docs = w.docs
			return next
		},
	}
	for name, die := range deaths {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.ask(shadow.OpUpdate, `{"state":{"desired":{"volume":3}}}`)
			w.open("c1")
			w = die(w)
			all := slices.Concat(
				w.ask(shadow.OpGet, ``),
				w.ask(shadow.OpUpdate, `{"state":{"reported":{"battery":9}}}`),
				w.ask(shadow.OpUpdate, `{"state":{"desired":{"volume":4}}}`),
			)
			wantTopics(t, all, "get/accepted", "update/accepted", "update/delta", "update/documents", "update/accepted", "update/delta", "update/documents")
			for _, s := range all {
				if s.shows("c1") || s.until != (clock.Deadline{}) {
					t.Errorf("%s: %s", s.topic, s.body)
				}
			}
			if _, ok := w.stored().Desired("open"); !ok {
				t.Error("the test is about a command that is still stored")
			}
		})
	}
}

// A shadow that holds nothing but a dead command has no delta at all.
func TestDeadCommandAlone(t *testing.T) {
	w := newWorld(t)
	w.open("c1")
	w.step(10*time.Second, 10*time.Second)
	wantTopics(t, w.ask(shadow.OpUpdate, `{"state":{"reported":{"battery":9}}}`), "update/accepted", "update/documents")
}

// A newer command replaces an older one, whose withdrawal leaves it alone.
func TestWithdrawLeavesANewerCommandAlone(t *testing.T) {
	w := newWorld(t)
	w.open("c1")
	w.take()
	w.open("c2")
	if delta := w.take()[0]; delta.shows("c1") || !delta.shows("c2") {
		t.Errorf("delta: %s", delta.body)
	}
	for _, id := range []string{"c1", "", "c3"} {
		g, err := w.Withdraw(t.Context(), thing, id)
		if g != nil || err != nil {
			t.Fatalf("Withdraw %q: %v, %v", id, g, err)
		}
	}
	if got := w.ask(shadow.OpGet, ``); !got[0].shows("c2") || got[0].shows("c1") {
		t.Errorf("get: %s", got[0].body)
	}
	w.withdraw("c2")
	if got := w.ask(shadow.OpGet, ``); got[0].shows("c2") {
		t.Errorf("get: %s", got[0].body)
	}
	g, err := w.Withdraw(t.Context(), "never-seen", "c1")
	if g != nil || err != nil {
		t.Errorf("Withdraw of a thing without a shadow: %v, %v", g, err)
	}
}

// Send after the deadline refuses with ErrTooLate, and nothing is published,
// whatever else the delta would have held.
func TestSendAfterTheDeadline(t *testing.T) {
	for name, step := range map[string]func(*world){
		"wall":   func(w *world) { w.step(10*time.Second, 0) },
		"steady": func(w *world) { w.step(-time.Hour, 10*time.Second) },
	} {
		for _, other := range []string{`{"reported":{"a":1}}`, `{"desired":{"a":1}}`} {
			t.Run(name, func(t *testing.T) {
				w := newWorld(t)
				w.ask(shadow.OpUpdate, `{"state":`+other+`}`)
				g, err := w.Stage(t.Context(), thing, w.command("c1", 10*time.Second))
				must(t, err)
				must(t, w.SaveShadows(t.Context(), g.Row()))
				step(w)
				w.take()
				if err := g.Send(); !errors.Is(err, shadow.ErrTooLate) {
					t.Errorf("Send: %v", err)
				}
				if got := w.take(); len(got) > 0 {
					t.Errorf("sent %+v", got)
				}
				w.step(time.Hour, -10*time.Second) // not even if the clock comes back
				w.step(-time.Hour-10*time.Second, 0)
				if got := w.ask(shadow.OpGet, ``); got[0].shows("c1") {
					t.Errorf("get: %s", got[0].body)
				}
			})
		}
	}
}

// A newer command that was recorded and could not be sent does not pass for the
// older one, which is still good.
func TestUnsentCommandBesideALiveOne(t *testing.T) {
	w := newWorld(t)
	w.open("c1")
	g, err := w.Stage(t.Context(), thing, w.command("c2", time.Second))
	must(t, err)
	must(t, w.SaveShadows(t.Context(), g.Row()))
	w.step(time.Second, time.Second)
	if err := g.Send(); !errors.Is(err, shadow.ErrTooLate) {
		t.Fatalf("Send: %v", err)
	}
	if got := w.ask(shadow.OpGet, ``); got[0].shows("c1") || got[0].shows("c2") {
		t.Errorf("get: %s", got[0].body)
	}
}

// A device that is offline is told nothing, and a command that found it offline
// is shown to nobody later.
func TestOffline(t *testing.T) {
	w := newWorld(t)
	w.offline = true
	if _, err := w.Stage(t.Context(), thing, w.command("c1", time.Minute)); !errors.Is(err, shadow.ErrOffline) {
		t.Errorf("Stage: %v", err)
	}
	w.offline = false
	g, err := w.Stage(t.Context(), thing, w.command("c1", time.Minute))
	must(t, err)
	must(t, w.SaveShadows(t.Context(), g.Row()))
	w.offline = true
	if err := g.Send(); !errors.Is(err, shadow.ErrOffline) {
		t.Errorf("Send: %v", err)
	}
	if got := w.take(); len(got) > 0 {
		t.Errorf("sent %+v", got)
	}
	w.offline = false
	if got := w.ask(shadow.OpGet, ``); got[0].shows("c1") {
		t.Errorf("get: %s", got[0].body)
	}
}

// Requests for one thing are worked on one after the other, those for others
// meanwhile. Here the first update stops in the middle, amid what it stores.
func TestUpdatesOfOneThingAreSerialised(t *testing.T) {
	w := newWorld(t)
	reached, proceed := make(chan struct{}), make(chan struct{})
	var stopped atomic.Bool
	w.saving = func(rows []shadow.Row) error {
		if rows[0].Thing == thing && stopped.CompareAndSwap(false, true) {
			close(reached)
			<-proceed
		}
		return nil
	}
	const many = 20
	var updates sync.WaitGroup
	update := func(i int) {
		w.Handle(t.Context(), thing, classic, shadow.OpUpdate, fmt.Appendf(nil, `{"state":{"reported":{"a%d":1}}}`, i))
	}
	updates.Go(func() { update(0) })
	<-reached
	for i := 1; i < many; i++ {
		updates.Go(func() { update(i) })
	}
	w.Handle(t.Context(), "other", shadow.Address{Thing: "other"}, shadow.OpUpdate, []byte(`{"state":{"reported":{"a":1}}}`))
	if got := w.take(); len(got) != 2 || !strings.Contains(got[0].topic, "things/other/") {
		t.Errorf("while the first was stopped: %v", topics(got))
	}
	close(proceed)
	updates.Wait()
	if v := w.stored().Version(); v != many {
		t.Errorf("version %d after %d updates", v, many)
	}
	for i := range many {
		if _, ok := w.stored().Reported(fmt.Sprintf("a%d", i)); !ok {
			t.Errorf("update %d was lost", i)
		}
	}
	for i, s := range w.take() { // each with its own answers, in order
		if want := []string{"update/accepted", "update/documents"}[i%2]; s.topic != want || !bytes.Contains([]byte(s.body), fmt.Appendf(nil, `"version":%d`, i/2+1)) {
			t.Fatalf("answer %d: %s %s", i, s.topic, s.body)
		}
	}
}

// A staged command holds its thing until it is sent or dropped.
func TestStagedHoldsTheThing(t *testing.T) {
	for name, end := range map[string]func(*shadow.Staged){
		"Drop": (*shadow.Staged).Drop,
		"Send": func(g *shadow.Staged) { _ = g.Send() },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			g, err := w.Stage(t.Context(), thing, w.command("c1", time.Minute))
			must(t, err)
			done := make(chan struct{})
			go func() {
				defer close(done)
				w.Handle(t.Context(), thing, classic, shadow.OpUpdate, []byte(`{"state":{"reported":{"a":1}}}`))
			}()
			select {
			case <-done:
				t.Error("an update went through a staged command")
			case <-time.After(20 * time.Millisecond): // long enough to go wrong
			}
			end(g)
			<-done
		})
	}
}

// A command that the shadow has no room for is refused, and the thing is free.
func TestStageWithoutRoom(t *testing.T) {
	w := newWorld(t)
	w.ask(shadow.OpUpdate, `{"state":{"reported":{"a":"`+strings.Repeat("x", shadow.MaxDocument-8)+`"}}}`)
	if _, err := w.Stage(t.Context(), thing, w.command("c1", time.Minute)); !errors.Is(err, shadow.ErrTooLarge) {
		t.Fatalf("Stage: %v", err)
	}
	wantTopics(t, w.ask(shadow.OpGet, ``), "get/accepted")
}
