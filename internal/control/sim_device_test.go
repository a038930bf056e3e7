package control_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/openlock/openlock/internal/device"
	"github.com/openlock/openlock/internal/lock"
)

// door is a lock with its device: internal/device's rules and its way of one
// command, on the simulation's time and network.
type door struct {
	s      *sim
	id     lock.ID
	thing  string
	link   *link         // the last connection, nil before the first
	offset time.Duration // of the device's wall clock from true time
	lost   bool          // the wall clock is known to mean nothing
	slow   time.Duration // until the bolt is ready, at most
	tokens int

	// What a reboot leaves.
	seen  map[string]*memory
	order []string // of ids, oldest first

	// What it does not.
	online   bool
	question *question
	measured *measurement
	current  *pending
	bolt     bolt
	outbox   []*memory
	sending  *sending
}

// memory is what the device durably knows of a command. No result: the bolt was
// about to move.
type memory struct {
	device.Command
	result    device.Kind
	reason    device.Reason
	at        time.Time
	delivered bool
}

type question struct {
	token string
	sent  time.Duration
}

type measurement struct {
	timestamp      time.Time
	sent, answered time.Duration
}

type pending struct {
	device.Command
	version               int64
	withdrawn, unanswered bool
}

type sending struct {
	token string
	sent  time.Duration
	about *memory // nil: only the state
}

// bolt is how far the bolt is from moving.
type bolt struct {
	preparing bool
	ready     time.Duration // when
}

// answerTimeout is how long a device waits for an answer.
const answerTimeout = 5 * time.Second

// downMessage is what the device reads of a message to it.
type downMessage struct {
	State struct {
		Open  json.RawMessage `json:"open"`
		Delta struct {
			Open json.RawMessage `json:"open"`
		} `json:"delta"`
	} `json:"state"`
	Version     int64  `json:"version"`
	Timestamp   int64  `json:"timestamp"`
	ClientToken string `json:"clientToken"`
	Code        int    `json:"code"`
}

func (d *door) wall() time.Time { return epoch.Add(d.s.now + d.offset) }

// hear takes one message that has arrived.
func (d *door) hear(topic string, payload []byte) {
	var m downMessage
	if err := json.Unmarshal(payload, &m); err != nil {
		d.s.fail("lock %s was sent %s", d.id, payload)
		return
	}
	switch strings.SplitN(topic, "/shadow/", 2)[1] {
	case "update/delta":
		d.take(m.State.Open, m.Version)
		d.advance()
	case "get/accepted":
		d.answered(m)
	case "get/rejected":
		if d.question != nil && d.question.token == m.ClientToken {
			d.giveUp()
		}
	case "update/accepted":
		d.accepted(m)
	case "update/rejected":
		if m.Code < 500 && m.Code != 429 {
			d.accepted(m) // never will be
		}
	}
}

func (d *door) answered(m downMessage) {
	if d.question == nil || d.question.token != m.ClientToken {
		return
	}
	d.measured = &measurement{time.Unix(m.Timestamp, 0), d.question.sent, d.s.now}
	d.question = nil
	if m.State.Delta.Open == nil && d.current != nil && m.Version >= d.current.version {
		d.current.withdrawn = true
	}
	d.take(m.State.Delta.Open, m.Version)
	d.advance()
}

func (d *door) take(open []byte, version int64) {
	if open == nil || d.current != nil && version < d.current.version {
		return
	}
	var c device.Command
	if err := c.UnmarshalJSON(open); err != nil {
		d.s.fail("lock %s was sent a command that is none: %s", d.id, open)
		return
	}
	if d.current != nil && d.current.ID == c.ID {
		d.current.version = version
		return
	}
	if d.current != nil {
		d.finish(d.current.Command, device.Failed, device.ReasonSuperseded)
	}
	d.current = &pending{Command: c, version: version}
}

func (d *door) situation() device.Situation {
	s := device.Situation{
		Seen: d.seen[d.current.ID] != nil, Withdrawn: d.current.withdrawn, Unanswered: d.current.unanswered,
		Now: d.wall(), ClockLost: d.lost, Battery: 100, Jammed: d.s.rng.IntN(50) == 0,
	}
	if m := d.measured; m != nil {
		s.Reading = &device.Reading{Timestamp: m.timestamp, SinceSent: d.s.now - m.sent, SinceAnswer: d.s.now - m.answered}
	}
	return s
}

// advance takes the current command as far as it can go now.
func (d *door) advance() {
	if d.current == nil {
		return
	}
	v := device.Decide(d.current.Command, d.situation())
	if v.Action == device.Ask {
		d.get()
		return
	}
	if v.Action == device.Open && !(d.bolt.preparing && d.s.now >= d.bolt.ready) {
		d.prepare()
		return
	}
	c := d.current.Command
	d.current, d.bolt = nil, bolt{}
	switch v.Action {
	case device.Open:
		d.open(c)
	case device.Refuse:
		d.finish(c, device.Refused, v.Reason)
	case device.Fail:
		d.finish(c, device.Failed, v.Reason)
	default:
		d.report(d.seen[c.ID])
	}
}

func (d *door) prepare() {
	if !d.bolt.preparing {
		d.bolt = bolt{true, d.s.now + time.Duration(d.s.rng.Int64N(d.slow.Milliseconds()+1))*time.Millisecond}
	}
}

// open moves the bolt. The power may go before it moves and after.
func (d *door) open(c device.Command) {
	d.remember(&memory{Command: c, at: d.wall()})
	if d.s.rng.IntN(30) == 0 {
		d.reboot("before the bolt moved")
		return
	}
	d.s.moved(d, c.ID)
	if d.s.rng.IntN(30) == 0 {
		d.reboot("after the bolt moved")
		return
	}
	d.finish(c, device.Opened, "")
}

func (d *door) remember(m *memory) {
	if d.seen[m.ID] == nil {
		d.order = append(d.order, m.ID)
	}
	d.seen[m.ID] = m
}

func (d *door) finish(c device.Command, result device.Kind, reason device.Reason) {
	m := &memory{Command: c, result: result, reason: reason, at: d.wall()}
	d.remember(m)
	d.s.log("lock %s: %s %s %s", d.id, c.ID, result, reason)
	d.report(m)
}

func (d *door) report(m *memory) {
	for _, waiting := range d.outbox {
		if waiting.ID == m.ID {
			return
		}
	}
	d.outbox = append(d.outbox, m)
	d.flush()
}

// reboot forgets what is not durable and takes up what was interrupted.
func (d *door) reboot(when string) {
	d.s.log("lock %s: reboots %s", d.id, when)
	d.disconnected()
	d.current, d.bolt, d.measured, d.outbox = nil, bolt{}, nil, nil
	for _, id := range d.order {
		m := d.seen[id]
		switch {
		case m.delivered:
		case m.result == "":
			d.finish(m.Command, device.Failed, device.ReasonInterrupted)
		default:
			d.report(m)
		}
	}
}

func (d *door) connected(l *link) {
	d.link, d.online, d.question, d.sending = l, true, nil, nil
	d.get()
	d.flush()
}

func (d *door) disconnected() {
	d.online, d.question, d.sending = false, nil, nil
	if d.link != nil {
		d.link.device = false
	}
}

func (d *door) get() {
	if d.online && d.question == nil {
		d.question = &question{d.token(), d.s.now}
		d.publish("get", map[string]any{"clientToken": d.question.token})
	}
}

func (d *door) giveUp() {
	d.question = nil
	if d.current != nil {
		d.current.unanswered = true
	}
	d.advance()
}

// flush sends the next report; one is on its way at a time.
func (d *door) flush() {
	if !d.online || d.sending != nil || len(d.outbox) == 0 {
		return
	}
	m := d.outbox[0]
	d.sending = &sending{token: d.token(), sent: d.s.now, about: m}
	result := map[string]any{"id": m.ID, "result": m.result, "at": m.at.UnixMilli()}
	if m.reason != "" {
		result["reason"] = m.reason
	}
	d.publish("update", map[string]any{
		"state":       map[string]any{"reported": map[string]any{"open": m.Command, "openResult": result}},
		"clientToken": d.sending.token,
	})
}

func (d *door) accepted(m downMessage) {
	if d.sending == nil || d.sending.token != m.ClientToken {
		return
	}
	d.sending.about.delivered = true
	d.sending = nil
	d.outbox = d.outbox[1:]
	d.flush()
}

// tick does what time has brought.
func (d *door) tick() {
	if d.question != nil && d.s.now >= d.question.sent+answerTimeout {
		d.giveUp()
	}
	if d.sending != nil && d.s.now >= d.sending.sent+answerTimeout {
		d.sending = nil
		d.flush()
	}
	if d.bolt.preparing && d.s.now >= d.bolt.ready {
		d.advance()
	}
}

func (d *door) token() string {
	d.tokens++
	return fmt.Sprintf("%s-%d", d.thing, d.tokens)
}

func (d *door) publish(op string, body any) {
	payload, err := json.Marshal(body)
	if err != nil {
		d.s.fail("%v", err)
	}
	d.link.up = append(d.link.up, upMessage{op, payload})
}
