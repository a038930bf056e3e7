package control_test

import (
	"fmt"
	"time"

	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/shadow"
)

// actions are what may happen next, with how often it does. The first of them
// happen in every world.
var actions = []struct {
	weight int
	do     func(*sim)
}{
	{100, (*sim).traffic},
	{30, (*sim).askAnew},
	{14, (*sim).askAgain},
	{14, (*sim).aMoment},
	{30, (*sim).link},
	{10, func(s *sim) { s.fillDisk(false) }},
	{3, (*sim).aWhile},
	{1, (*sim).aLongTime},
	{3, func(s *sim) { s.door().reboot("") }},
	{3, (*sim).setClock},
	{3, (*sim).setDeviceClock},
	{2, (*sim).revokeKey},
	{3, (*sim).suspend},
	{8, (*sim).changeLock},
	{2, (*sim).writeDesired},
	{2, (*sim).impostor},
	{1, func(s *sim) { s.fillDisk(true) }},
	{1, func(s *sim) { s.die("nothing in particular") }},
}

const always = 6

// chooseWeights makes some actions rarer than others, or leaves them out: a
// world in which everything happens all the time reaches fewer corners.
func (s *sim) chooseWeights() {
	for i, a := range actions {
		factor := []int{0, 1, 1, 4}[s.rng.IntN(4)]
		if i < always {
			factor = max(1, factor)
		}
		s.weights = append(s.weights, a.weight*factor)
		s.weight += a.weight * factor
	}
}

func (s *sim) act() {
	s.stats.steps++
	n := s.rng.IntN(s.weight)
	for i, a := range actions {
		if n -= s.weights[i]; n < 0 {
			a.do(s)
			break
		}
	}
	if s.rng.IntN(3) == 0 {
		s.elapse(time.Duration(s.rng.IntN(50)) * time.Millisecond)
	}
	if !s.broken {
		s.checkDesired()
	}
}

func (s *sim) door() *door { return s.doors[s.rng.IntN(len(s.doors))] }

// traffic moves what is on its way between a device and the server.
func (s *sim) traffic() {
	d := s.door()
	for range 1 + s.rng.IntN(6) {
		l := d.link
		if l.server && len(l.held) > 0 {
			s.write(d)
		}
		if l.stalled {
			return
		}
		if l.device && len(l.wire) > 0 {
			s.deliverDown(d)
		}
		if len(l.acks) > 0 {
			s.deliverAck(d)
		}
		if len(l.up) > 0 {
			s.deliverUp(d)
		}
	}
}

// askAnew: somebody wants a door to open.
func (s *sim) askAnew() {
	c := &call{by: s.one("acme", "olga", "karl", "bolt", "stranger", "super"), lock: s.door().id, reason: s.one("", "parcel")}
	if s.rng.IntN(2) == 0 {
		c.by = s.locks[control.Stream(c.lock)].state.OrgID
	}
	if s.pendingOf(c.lock) > 20 {
		return
	}
	if n := len(s.calls) + 1; s.rng.IntN(4) > 0 {
		if s.rng.IntN(3) > 0 {
			c.request = fmt.Sprintf("r%d", n/2)
		}
		if s.rng.IntN(2) > 0 {
			c.header = fmt.Sprintf("h%d", n)
		}
	}
	s.calls = append(s.calls, c)
	s.disturb(c)
	s.send(c)
}

// disturb lets something happen between the decision on a call and its record.
func (s *sim) disturb(c *call) {
	switch s.rng.IntN(25) {
	case 0:
		s.atID = func() { s.now += time.Duration(s.rng.IntN(12000)) * time.Millisecond }
	case 1:
		s.atID = func() { s.atID = nil; s.revoke(s.one("acme", "bolt")) }
	case 2:
		s.atID = func() { s.setSuspended(c.by, true) }
	}
}

func (s *sim) pendingOf(id lock.ID) int { return len(s.locks[control.Stream(id)].state.Pending) }

// askAgain: a client that heard nothing, or is not content, asks again.
func (s *sim) askAgain() {
	if len(s.calls) == 0 {
		return
	}
	c := s.calls[max(0, len(s.calls)-1-s.rng.IntN(12))]
	if s.rng.IntN(10) == 0 {
		other := *c
		other.reason = "another"
		c = &other
	}
	if s.pendingOf(c.lock) > 20 {
		return
	}
	s.send(c)
}

func (s *sim) aMoment() {
	s.pass(time.Duration(1+s.rng.IntN(3000))*time.Millisecond, s.rng.IntN(4) > 0)
}
func (s *sim) aWhile() { s.pass(time.Duration(5+s.rng.IntN(70))*time.Second, s.rng.IntN(3) > 0) }
func (s *sim) aLongTime() {
	s.pass([]time.Duration{time.Hour, 23*time.Hour + 30*time.Minute, 24 * time.Hour}[s.rng.IntN(3)], true)
	if s.rng.IntN(2) == 0 {
		s.setClock()
	}
	s.askAgain()
}

// link lets a connection end, begin, stall and go on.
func (s *sim) link() {
	d := s.door()
	l := d.link
	switch n := s.rng.IntN(20); {
	case !l.device:
		s.connect(d)
	case !l.server && n < 15:
		s.log("lock %s: notices that the server has gone", d.id)
		d.disconnected()
		s.connect(d)
	case l.stalled && n < 15:
		s.log("lock %s: traffic goes on", d.id)
		l.stalled = false
	case n == 16:
		s.log("lock %s: disconnected", d.id)
		l.server, l.held = false, nil
		d.disconnected()
	case n == 17:
		s.log("lock %s: disconnects, which the server does not notice", d.id)
		d.disconnected()
	case n == 18:
		s.log("lock %s: the server drops the session, which the device does not notice", d.id)
		l.server, l.held = false, nil
	case n == 19:
		s.log("lock %s: nothing gets through", d.id)
		l.stalled = true
	}
}

// setClock steps the server's wall clock by an hour, or back to the truth.
func (s *sim) setClock() {
	s.step = []time.Duration{time.Hour, -time.Hour, 0, 0}[s.rng.IntN(4)]
	s.log("the server's clock is off by %s", s.step)
}

// fillDisk makes the store refuse to record, or lets it record again.
func (s *sim) fillDisk(full bool) {
	if s.full != full {
		s.log("the disk is full: %t", full)
		s.full = full
		check(s.db.SetSetting(s.ctx, "simulated disk", map[bool]string{true: "full", false: ""}[full]))
	}
}

func (s *sim) setDeviceClock() {
	d := s.door()
	d.offset, d.lost = s.about([]time.Duration{time.Second, 2 * time.Second, 5 * time.Second, 2 * time.Hour}[s.rng.IntN(4)]), s.rng.IntN(5) == 0
	s.log("lock %s: its clock is off by %s, lost %t", d.id, d.offset, d.lost)
}

// revokeKey replaces an organisation's key; somebody may still use the old one.
func (s *sim) revokeKey() {
	org := s.one("acme", "bolt")
	s.revoke(org)
	c := &call{by: org, lock: s.door().id}
	s.calls = append(s.calls, c)
	s.send(c) // authenticated before the revocation
	s.newKey(org)
}

func (s *sim) revoke(org string) {
	s.observe()
	id := s.key(org)
	s.log("key %s is revoked", id)
	check(s.db.RevokeCredential(s.ctx, org, id, s.clock().Wall()))
	s.revoked["key:"+id] = true
}

func (s *sim) suspend() { s.setSuspended(s.one("olga", "karl"), s.rng.IntN(4) == 0) }

func (s *sim) setSuspended(user string, suspended bool) {
	s.observe()
	s.log("user %s suspended: %t", user, suspended)
	if suspended {
		check(s.db.SuspendUser(s.ctx, user, s.clock().Wall()))
	} else {
		check(s.db.ReactivateUser(s.ctx, user))
	}
	s.revoked["user:"+user] = suspended
}

// changeLock gives a lock another owner, organisation or key, or takes one.
func (s *sim) changeLock() {
	key := s.one("k1", "k2")
	cmd := []lock.Command{
		lock.SetOwner{UserID: s.one("olga", "olga", "otto")},
		lock.SetOrganization{OrgID: s.one("acme", "acme", "bolt")},
		lock.AddKey{Key: lock.Key{UUID: key, UserID: s.one("karl", "karl", "stranger")}},
		lock.AddKey{Key: lock.Key{UUID: key, UserID: "karl"}},
		lock.RemoveKey{UUID: key},
	}[s.rng.IntN(5)]
	s.manage(s.one("super", "super", "acme", "bolt", "olga", "karl"), s.door().id, cmd)
}

// writeDesired: an app changes another field of the desired state.
func (s *sim) writeDesired() {
	s.update("", s.door(), fmt.Sprintf(`{"state":{"desired":{"mode":%d}}}`, s.rng.IntN(5)))
}

// impostor: somebody says or asks what only others may.
func (s *sim) impostor() {
	d, other := s.doors[0], s.doors[1]
	id := "c0001"
	if len(s.made) > 0 {
		id = s.made[len(s.made)-1]
	}
	result := fmt.Sprintf(`{"state":{"reported":{"openResult":{"id":%q,"result":"opened","at":1}}}}`, id)
	switch s.rng.IntN(4) {
	case 0: // another's thing
		s.update(other.thing, d, result)
	case 1: // another's command
		for _, d := range s.doors {
			if s.commands[id] != nil && d.id != s.commands[id].by.lock {
				s.update(d.thing, d, result)
			}
		}
	case 2: // a command of one's own making
		now := s.clock().Wall().UnixMilli()
		s.update(d.thing, d, fmt.Sprintf(`{"state":{"desired":{"open":["forged",%d,%d]}}}`, now, now+10000))
	case 3: // takes a command away, which only its end may
		s.update("", d, `{"state":{"desired":null}}`)
	}
}

// update brings a shadow update from a thing's connection, "" for an app.
func (s *sim) update(from string, d *door, body string) {
	s.serve(fmt.Sprintf("%q updates %s: %s", from, d.thing, body), func() {
		s.shadows.Handle(s.ctx, from, shadow.Address{Thing: d.thing}, shadow.OpUpdate, []byte(body))
	})
}

func (s *sim) one(of ...string) string { return of[s.rng.IntN(len(of))] }
