package control_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/openlock/openlock/internal/access"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/shadow"
	"github.com/openlock/openlock/internal/store"
)

// command is all that the simulation knows of one command, in true time.
type command struct {
	id       string
	by       *call
	received time.Duration
	asked    *event.Record // the request, once it is in the log
	ended    *event.Record
	endedAt  time.Duration
	overdue  time.Duration // uptime since the end should have been recorded
	accepted bool          // by the way to its device
	run      int           // of the server, which it belongs to
	dead     string        // why it may not move the door any more, "" if it may
	moved    int
}

// name is what a requestId or Idempotency-Key stands for.
type name struct {
	command *command
	at      time.Duration
}

// knownLock is a lock as its log has made it so far.
type knownLock struct {
	state   lock.State
	records []event.Record
	sent    *command // the last one, unless that could not be sent or was withdrawn
}

// moved is called when a bolt moves. (Invariants 1, 2, 5 and the device's part
// of "not twice".)
func (s *sim) moved(d *door, id string) {
	s.stats.moves++
	s.log("lock %s: OPENS for %s", d.id, id)
	c := s.commands[id]
	if c == nil || c.asked == nil {
		s.fail("the door opened for %s, which is not in the log", id)
		return
	}
	c.moved++
	switch late := s.now - c.received - settings.Expiry - settings.Skew; {
	case c.asked.Stream != control.Stream(d.id):
		s.fail("lock %s opened for %s of %s", d.id, id, c.asked.Stream)
	case c.moved > 1:
		s.fail("the door opened twice for %s", id)
	case late > 0:
		s.fail("the door opened %s after the latest end of %s", late, id)
	case c.dead != "":
		s.fail("the door opened for %s, which could not open it any more: %s", id, c.dead)
	}
}

// checkShown is called for what the server gives to a device. Whatever shows a
// command must be durable, in time and by right. (Invariants 1, 2, 8.)
func (s *sim) checkShown(thing, topic string, payload []byte) {
	id := shownCommand(topic, payload)
	if id == "" {
		return
	}
	s.observe() // readers see what is durable, nothing else
	c := s.commands[id]
	switch {
	case c == nil || c.asked == nil:
		s.fail("command %s leaves before its request is durable", id)
	case c.asked.Stream != control.Stream(must(lock.OfThing(thing))):
		s.fail("command %s of %s is sent to %s", id, c.asked.Stream, thing)
	case s.now >= c.received+settings.Expiry || s.clock().Wall().UnixMilli() >= c.asked.Meta.ExpiresAt:
		s.fail("command %s is shown after its expiry", id)
	case c.ended != nil:
		s.fail("command %s is shown after its end", id)
	case c.run != s.stats.deaths:
		s.fail("command %s is shown by a server that found it unfinished", id)
	case c.dead != "":
		s.fail("command %s is shown: %s", id, c.dead)
	case !access.Stands(access.Right(c.asked.Meta.Right), control.Facts(s.locks[c.asked.Stream].state)):
		s.fail("command %s is shown, the right that carried it is gone", id)
	}
}

// shownCommand is the id of the command that a message shows as desired.
func shownCommand(topic string, payload []byte) string {
	type section struct {
		Open json.RawMessage `json:"open"`
	}
	var m struct {
		State struct {
			section
			Desired section `json:"desired"`
			Delta   section `json:"delta"`
		} `json:"state"`
		Previous, Current struct {
			State struct {
				Desired section `json:"desired"`
			} `json:"state"`
		}
	}
	if json.Unmarshal(payload, &m) != nil {
		return "unreadable"
	}
	shows := [][]byte{m.State.Delta.Open, m.State.Desired.Open, m.Previous.State.Desired.Open, m.Current.State.Desired.Open}
	if suffix(topic) == "update/delta" {
		shows = append(shows, m.State.Open)
	}
	for _, raw := range shows {
		var parts []any
		if json.Unmarshal(raw, &parts) == nil && len(parts) > 0 {
			return parts[0].(string)
		}
	}
	return ""
}

// observe reads what is new in the log and holds it against the rules.
func (s *sim) observe() (news int) {
	records, err := s.db.After(s.ctx, s.position, 1000)
	if err != nil {
		s.fail("read the log: %v", err)
		return 0
	}
	for _, r := range records {
		s.position = r.Position
		s.record(r)
	}
	return len(records)
}

func (s *sim) record(r event.Record) {
	s.log("log: %s v%d %s %s right=%q by=%q %s", r.Stream, r.Version, r.Type, r.Meta.Command, r.Meta.Right, r.Meta.Actor, r.Data)
	l := s.locks[r.Stream]
	if l == nil {
		l = &knownLock{}
		s.locks[r.Stream] = l
	}
	if r.Version != l.state.Version+1 {
		s.fail("%s: version %d follows %d", r.Stream, r.Version, l.state.Version)
	}
	s.checkRight(l.state, r)
	l.records = append(l.records, r)
	s.evolve(l, r)
	if l.sent != nil && !access.Stands(access.Right(l.sent.asked.Meta.Right), control.Facts(l.state)) {
		l.sent = nil
	}
	switch r.Type {
	case "LockOpenRequested":
		s.requested(r)
	case "LockOpened", "LockOpenRefused", "LockOpenFailed", "LockOpenExpired":
		s.ended(r)
	case "OpenReportedLate":
		s.stats.late++
		s.checkReport(r)
	}
}

// evolve is a step of control.Refold, which the audit asks in the end.
func (s *sim) evolve(l *knownLock, r event.Record) {
	e, err := lock.Decode(r.Type, r.Schema, r.Data, r.Org, lock.Open{
		ID: lock.CommandID(r.Meta.Command), Right: r.Meta.Right, IssuedAt: r.Meta.IssuedAt, ExpiresAt: r.Meta.ExpiresAt,
	})
	if err != nil {
		s.fail("%v", err)
		return
	}
	l.state = lock.Evolve(l.state, e, r.Version, r.Time)
}

// checkRight: who is recorded had that right in that moment. (Invariants 8, 9.)
func (s *sim) checkRight(before lock.State, r event.Record) {
	if credential := r.Meta.Credential; s.revoked[credential] {
		s.fail("%s of %s was recorded for %s, which was revoked before", r.Type, r.Stream, credential)
	}
	kind, what, _ := strings.Cut(r.Meta.Right, ":")
	switch kind {
	case "owner", "key":
		user := what[strings.Index(what, "@")+1:]
		if r.Meta.Actor != "user:"+user || r.Meta.Org != "" || s.revoked["user:"+user] {
			s.fail("%s of %s: %s, suspended %t, used the right %s", r.Type, r.Stream, r.Meta.Actor, s.revoked["user:"+user], r.Meta.Right)
		}
	case "org":
		if r.Meta.Org != what {
			s.fail("%s of %s: organisation %q used the right %s", r.Type, r.Stream, r.Meta.Org, r.Meta.Right)
		}
	case "":
		if r.Meta.Actor != "server" && !strings.HasPrefix(r.Meta.Actor, "device:") && r.Version > 1 && r.Type != "LockOpenRequested" {
			s.fail("%s of %s by %q without a right", r.Type, r.Stream, r.Meta.Actor)
		}
		return
	}
	if !access.Stands(access.Right(r.Meta.Right), control.Facts(before)) {
		s.fail("%s of %s: the right %s did not stand", r.Type, r.Stream, r.Meta.Right)
	}
}

// requested: the request is new, the caller's own, and repeats nothing.
// (Invariants 2, 3, 12.)
func (s *sim) requested(r event.Record) {
	s.stats.commands++
	c := s.commands[r.Meta.Command]
	if c == nil || c.asked != nil {
		s.fail("command %q was requested by nobody, or twice", r.Meta.Command)
		return
	}
	c.asked = &r
	s.locks[r.Stream].sent = c
	if r.Meta.Right == "" {
		s.fail("command %s was requested without a right", c.id)
	}
	for _, key := range c.by.names() {
		if first := s.names[key]; first.command != nil && !s.released(key, first) {
			s.fail("%s repeats %s: both %s and %s are recorded", c.id, key, first.command.id, c.id)
		}
		s.names[key] = name{c, s.now}
	}
}

// released says whether a name may stand for another command than before.
func (s *sim) released(key string, n name) bool {
	if n.command.ended != nil && outcome(n.command.ended).Delivered == lock.DeliveredNo {
		return true
	}
	if strings.Contains(key, "|header:") {
		return s.now >= n.at+24*time.Hour
	}
	return n.command.ended != nil && s.now >= n.command.endedAt+settings.Window
}

// ended: one outcome a command, "opened" by the device's word alone.
// (Invariants 6, 7.)
func (s *sim) ended(r event.Record) {
	s.stats.outcomes[r.Type]++
	c := s.commands[r.Meta.Command]
	if c == nil || c.asked == nil || c.ended != nil || c.asked.Stream != r.Stream {
		s.fail("%s ends %q, which was not under way", r.Type, r.Meta.Command)
		return
	}
	c.ended, c.endedAt = &r, s.now
	if outcome(&r).Delivered == lock.DeliveredNo {
		c.dead = "it was recorded as not delivered"
		s.locks[r.Stream].sent = nil
		if c.moved > 0 {
			s.fail("%s has moved the door and is recorded as not delivered", c.id)
		}
	}
	s.checkReport(r)
}

func (s *sim) checkReport(r event.Record) {
	out, c := outcome(&r), s.commands[r.Meta.Command]
	byDevice := r.Meta.Actor == "device:"+s.locks[r.Stream].state.ThingName
	if byDevice != (out.ConfirmedBy == "device") || out.Result == lock.Opened && !byDevice {
		s.fail("%s of %s by %s, confirmed by %s", r.Type, c.id, r.Meta.Actor, out.ConfirmedBy)
	}
	if out.Result == lock.Opened && c.moved == 0 {
		s.fail("the log says that %s opened the door, which did not move", c.id)
	}
}

func outcome(r *event.Record) (o lock.Outcome) {
	if err := json.Unmarshal(r.Data, &o); err != nil {
		panic(err)
	}
	return o
}

// checkAnswer holds what a client was told against the log. (Invariants 3, 4, 5.)
func (s *sim) checkAnswer(c *call, made []*command, a control.Answer, err error) {
	switch {
	case err == nil:
		s.checkOK(c, made, a)
	case errors.Is(err, control.ErrNotSent):
		s.stats.unsent++
		for _, m := range made {
			s.bury(m, "its caller was told 502")
		}
		if a.Command != nil {
			s.bury(s.commands[string(a.Command.ID)], "a caller was told 502")
		}
	default:
		s.expectRefusal(err)
		for _, m := range made {
			if m.asked != nil {
				s.fail("the call was answered %v, and %s is recorded", err, m.id)
			}
		}
	}
}

func (s *sim) expectRefusal(err error) {
	s.stats.refused++
	if s.full {
		return
	}
	for _, known := range []error{control.ErrForbidden, control.ErrMismatch, auth.ErrUnauthenticated, lock.ErrUnknownKey} {
		if errors.Is(err, known) {
			return
		}
	}
	s.fail("unexpected: %v", err)
}

func (s *sim) bury(c *command, why string) {
	if c.moved > 0 {
		s.fail("%s has moved the door: %s", c.id, why)
	}
	c.dead = why
}

func (s *sim) checkOK(c *call, made []*command, a control.Answer) {
	if a.Event == nil || a.Event.Type != "LockOpenRequested" || a.Event.Stream != control.Stream(c.lock) {
		s.fail("200 without its event: %+v", a)
		return
	}
	told := s.commands[a.Event.Meta.Command]
	if told == nil || told.asked == nil || told.asked.Version != a.Event.Version || a.Command == nil || string(a.Command.ID) != told.id {
		s.fail("200 with an event that is not in the log: %+v", a.Event)
		return
	}
	if told.dead != "" && !s.forgotten(told) {
		s.fail("200 for %s: %s", told.id, told.dead)
	}
	if !a.Replayed {
		if !told.accepted {
			s.fail("200 for %s, which was not sent", told.id)
		}
		if len(made) == 0 || made[len(made)-1] != told {
			s.fail("200 for %s, which this call did not make", told.id)
		}
		return
	}
	s.stats.replayed++
	if len(made) > 0 {
		s.fail("a repeat made %s", made[0].id)
	}
	for _, key := range c.names() {
		if n := s.names[key]; n.command == nil || s.released(key, n) {
			s.names[key] = name{told, s.now}
		}
	}
}

// forgotten says whether a server died before it could record that it had not
// sent a command, as on a full disk. Its successor cannot know that: it takes
// the command for one that may have been sent, whose name is not given free.
func (s *sim) forgotten(c *command) bool {
	return c.run != s.stats.deaths && c.ended != nil && outcome(c.ended).Delivered != lock.DeliveredNo
}

// checkEnds: every command ends in time, counted in uptime. (Invariant 6.)
func (s *sim) checkEnds(ran time.Duration) {
	for _, id := range s.made {
		c := s.commands[id]
		if c.asked == nil || c.ended != nil || s.now < c.received+settings.Expiry+settings.Skew {
			continue
		}
		if c.overdue += ran; c.overdue > 30*time.Second {
			s.fail("command %s has not ended", id)
		}
	}
}

// checkDesired: the command that was sent last stands in the desired state as
// long as it is pending and its right stands, and nothing else ever does.
func (s *sim) checkDesired() {
	for _, d := range s.doors {
		raw, doc := s.desiredOpen(d)
		c := s.locks[control.Stream(d.id)].sent
		if c != nil && c.ended == nil && c.dead == "" && !bytes.Contains(raw, []byte(c.id)) {
			s.fail("%s is under way, the desired state of lock %s holds %q: %s", c.id, d.id, raw, doc)
		}
	}
}

func (s *sim) desiredOpen(d *door) (raw, doc []byte) {
	doc, err := s.db.LoadShadow(s.ctx, shadow.Address{Thing: d.thing})
	if errors.Is(err, shadow.ErrNoDocument) {
		return nil, nil
	}
	if err != nil {
		s.fail("%v", err)
		return nil, nil
	}
	decoded, err := shadow.DecodeDocument(doc)
	if err != nil {
		s.fail("%v", err)
	}
	raw, _ = decoded.Desired("open")
	return raw, doc
}

// checkAll is the audit when everything must have ended. (Invariants 6, 11.)
func (s *sim) checkAll() {
	for _, id := range s.made {
		if c := s.commands[id]; c.asked != nil && c.ended == nil {
			s.fail("command %s never ended", id)
		}
		row, err := s.commandRow(id)
		if c := s.commands[id]; (c.asked != nil) != (err == nil) || err == nil && row.Outcome == nil {
			s.fail("command %s in the table of commands: %+v, %v", id, row, err)
		}
	}
	for _, d := range s.doors {
		if raw, _ := s.desiredOpen(d); len(raw) > 0 {
			s.fail("lock %s: desired.open still holds %s", d.id, raw)
		}
		s.checkState(d.id)
	}
}

func (s *sim) commandRow(id string) (store.CommandRow, error) {
	return s.db.Command(s.ctx, int64(s.commands[id].by.lock), id)
}

func (s *sim) checkState(id lock.ID) {
	kept, err := s.db.Lock(s.ctx, int64(id))
	if err != nil {
		s.fail("%v", err)
		return
	}
	state, err := control.Refold(s.locks[control.Stream(id)].records)
	folded := must(json.Marshal(state))
	if err != nil || string(kept) != string(folded) {
		s.fail("lock %s: kept beside the log: %s, fold of the log: %s, %v", id, kept, folded, err)
	}
}
