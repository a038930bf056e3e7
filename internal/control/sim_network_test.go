package control_test

import (
	"errors"
	"slices"
	"strings"

	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/shadow"
)

// link is one connection of a door, seen from both ends: each believes in it
// until it learns better.
type link struct {
	server, device bool
	stalled        bool      // nothing gets through for now
	held           []*packet // accepted by the server, no byte written yet
	wire           []*packet // written: they arrive whenever they do, or never
	acks           []*packet // on their way back
	up             []upMessage
}

type packet struct {
	topic   string
	payload []byte
	until   *clock.Deadline // nil: at any time
	acked   func()
	known   bool // the server has the acknowledgement
}

type upMessage struct {
	op      string
	payload []byte
}

// bus is the simulated broker. It keeps what shadow.Bus promises and no more.
type bus struct{ *sim }

func (b bus) session(thing string) *link {
	i := slices.IndexFunc(b.doors, func(d *door) bool { return d.thing == thing })
	if i < 0 || b.doors[i].link == nil || !b.doors[i].link.server {
		return nil
	}
	return b.doors[i].link
}

func (b bus) Present(thing string) bool {
	b.touch("Present")
	return b.session(thing) != nil
}

func (b bus) Publish(topic string, payload []byte) {
	b.touch("Publish")
	if id := shownCommand(topic, payload); id != "" {
		b.fail("command %s was published without a deadline on %s", id, topic)
	}
	if suffix(topic) == "update/documents" {
		return // no device subscribes to it
	}
	if l := b.session(strings.Split(topic, "/")[2]); l != nil && b.rng.IntN(20) > 0 {
		l.held = append(l.held, &packet{topic: topic, payload: payload})
	}
}

func (b bus) Command(thing, topic string, payload []byte, until clock.Deadline, acked func()) error {
	b.touch("Command")
	l := b.session(thing)
	if l == nil || b.rng.IntN(25) == 0 {
		if b.rng.IntN(4) == 0 {
			b.fillDisk(true) // so that taking the command back cannot be recorded either
		}
		return shadow.ErrOffline
	}
	b.checkShown(thing, topic, payload)
	if c := b.commands[shownCommand(topic, payload)]; c != nil {
		c.accepted = true
	}
	l.held = append(l.held, &packet{topic: topic, payload: payload, until: &until, acked: acked})
	b.touch("Command, accepted")
	return nil
}

// write puts what the server holds on the wire: nothing whose time is over.
func (s *sim) write(d *door) {
	l := d.link
	for _, p := range l.held {
		if p.until != nil && s.clock().Passed(*p.until) {
			continue
		}
		if s.rng.IntN(40) > 0 { // lost: on the wire, and never to arrive
			l.wire = append(l.wire, p)
		}
	}
	l.held = nil
}

// resetOverdue ends the sessions that have not acknowledged a command in time.
// What has left may still arrive.
func (s *sim) resetOverdue() {
	for _, d := range s.doors {
		if d.link == nil || !d.link.server {
			continue
		}
		overdue := func(p *packet) bool { return p.until != nil && !p.known && s.clock().Passed(*p.until) }
		if slices.ContainsFunc(d.link.wire, overdue) || slices.ContainsFunc(d.link.acks, overdue) {
			s.log("lock %s: session reset, a command was not acknowledged in time", d.id)
			d.link.server, d.link.held = false, nil
		}
	}
}

// deliverDown brings one written message to the device: mostly the oldest,
// sometimes one out of order, sometimes twice.
func (s *sim) deliverDown(d *door) {
	l := d.link
	i := 0
	if s.rng.IntN(8) == 0 {
		i = s.rng.IntN(len(l.wire))
	}
	p := l.wire[i]
	if s.rng.IntN(12) > 0 {
		l.wire = slices.Delete(l.wire, i, i+1)
	}
	s.log("lock %s: hears %s %s", d.id, suffix(p.topic), shownCommand(p.topic, p.payload))
	l.acks = append(l.acks, p)
	d.hear(p.topic, p.payload)
}

// deliverUp brings one message of the device to the server.
func (s *sim) deliverUp(d *door) {
	l := d.link
	i := 0
	if s.rng.IntN(8) == 0 {
		i = s.rng.IntN(len(l.up))
	}
	m := l.up[i]
	fate := s.rng.IntN(16)
	if fate != 0 {
		l.up = slices.Delete(l.up, i, i+1)
	}
	if fate == 1 || !l.server {
		return // lost
	}
	s.serve("lock "+d.id.String()+" "+m.op, func() {
		s.shadows.Handle(s.ctx, d.thing, shadow.Address{Thing: d.thing}, shadow.Operation(m.op), m.payload)
	})
}

func (s *sim) deliverAck(d *door) {
	p := d.link.acks[0]
	d.link.acks = d.link.acks[1:]
	if !d.link.server || p.known || s.rng.IntN(10) == 0 {
		return
	}
	p.known = true
	if p.acked != nil {
		p.acked()
	}
}

// connect gives a door a new connection, with a clean session.
func (s *sim) connect(d *door) {
	if d.link != nil {
		d.link.server = false // taken over
	}
	l := &link{server: true, device: true}
	s.log("lock %s: connects", d.id)
	d.connected(l)
}

// storage is the real store, in which the server may die before a shadow is
// saved and after.
type storage struct{ *sim }

func (b storage) LoadShadow(ctx ctxt, a shadow.Address) ([]byte, error) {
	return b.db.LoadShadow(ctx, a)
}

func (b storage) SaveShadows(ctx ctxt, rows ...shadow.Row) error {
	b.touch("SaveShadows")
	if b.full {
		return errors.New("simulated: the disk is full")
	}
	err := b.db.SaveShadows(ctx, rows...)
	b.touch("SaveShadows, saved")
	return err
}

func suffix(topic string) string { return strings.SplitN(topic, "/shadow/", 2)[1] }
