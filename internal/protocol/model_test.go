// Package protocol searches, exhaustively within small bounds, the protocol by
// which a door is opened through a shadow that is not ours (AWS IoT Core): the
// intent is recorded first, then the shadow is called, and these are two steps.
//
// It models one lock and two commands. What may be late, lost or repeated is so
// in every order; "lost" is "later than everything else". The model is smaller
// than the program: it shows that the rules suffice and that each is needed, not
// that the program keeps them.
package protocol

import "fmt"

// Time counts in ticks. The server's clock is the true one, the device's is as
// slow as is allowed: a faster one only refuses more, and as nothing in the
// model ever has to move, it can do nothing that a slow one cannot.
const (
	life     = 1 // a command expires this long after it was asked for
	skew     = 1 // the device's clock is this much behind
	grace    = 1 // of server uptime after expiry and skew, until the outcome is recorded
	lastAsk  = 2
	lastTick = lastAsk + life + skew + grace + 1
)

// rules are the protocol's, each of which can be broken.
type rules struct {
	callsFirst      bool // the call may go out before the intent is durable
	answersFirst    bool // the 200 may
	retriesCalls    bool // the cloud's SDK repeats a call that is not answered
	hasty502        bool // a call that is not answered is a 502 at once
	waitsForReply   bool // a call that is not answered is waited for without end
	releasesUnknown bool // after a call that was never answered a retry runs anew
	recoverySends   bool // a starting server calls again
	clearsAnything  bool // clearing asks nothing
	acceptedIsOpen  bool // the shadow's word is taken for the device's
	ignoresExpiry   bool // the device does
	checksEarly     bool // the device checks expiry only when the command arrives
	forgets         bool // the device, when it reboots, what it has seen
}

// Where the server's process is with a command; a crash forgets it.
const (
	idle = iota
	taken
	called
	accepted
)

// What is durable of a command's end.
const (
	pending = iota
	opened
	failed  // the door was not told; a retry may run
	expired // of an accepted command, or of one that a starting server found
	unknown // expired, and the call was never answered
)

// What the client knows.
const (
	silent = iota
	waiting
	got200
	got502
	cutOff
)

const none = -1

// command is everything about one.
type command struct {
	asked, stage     int8 // tick; idle to accepted
	recorded         bool // LockOpenRequested, durable
	outcome          int8
	copies           int8 // calls on their way
	applied          bool
	reply            int8 // of the call, on its way: silent, got200 or got502
	clearing         bool // a clear is on its way
	client           int8
	told502          bool // ever
	overdue          int8 // ticks of uptime
	seen             bool // by the device, durable
	moved            int8
	report           bool // that it has opened, not yet delivered
	late, afterwards bool // the bolt moved after the deadline; after a 502
}

func (c command) expires() int8 { return c.asked + life }

type state struct {
	now     int8
	up      bool
	same    bool // the second command is a retry of the first one's requestId
	desired int8
	message int8 // command on its way to the device, by a delta or a get
	bolt    int8 // command for which the bolt is about to move
	wiped   bool // a clear took another command away
	cmd     [2]command
}

// start is when the first command is asked for; before that nothing happens.
func start() state {
	s := state{up: true, desired: none, message: none, bolt: none}
	s.cmd[0].stage, s.cmd[0].client, s.cmd[1].asked = taken, waiting, none
	return s
}

// broken names the invariant that a state breaks, "" for none.
func (s state) broken() string {
	for _, c := range s.cmd {
		switch {
		case c.late:
			return "1: the bolt moved after expiry and skew"
		case (c.copies > 0 || c.applied) && !c.recorded:
			return "2: the cloud was called before the intent was durable"
		case c.moved > 1:
			return "3: one command moved the bolt twice"
		case c.client == got200 && !c.recorded:
			return "4: 200 without a durable event"
		case c.afterwards:
			return "5: the bolt moved after the 502"
		case c.overdue > grace:
			return "6: no outcome in time"
		case c.outcome == opened && c.moved == 0:
			return "7: opened, without the device's report"
		}
	}
	if s.same && s.cmd[0].moved+s.cmd[1].moved > 1 {
		return "3: a repeated requestId moved the bolt twice"
	}
	if s.wiped {
		return "clearing a command took another one away"
	}
	return ""
}

// action is a step's name, for people.
type action struct {
	what string
	cmd  int
}

func (a action) String() string {
	if a.cmd == none {
		return a.what
	}
	return fmt.Sprintf("%s %d", a.what, a.cmd+1)
}

// next emits every state that one step leads to.
func (r rules) next(s state, emit func(action, state)) {
	for i := range s.cmd {
		step := func(may bool, what string, do func(*state, *command)) {
			if may {
				to := s
				do(&to, &to.cmd[i])
				emit(action{what, i}, to)
			}
		}
		r.client(s, i, step)
		r.server(s, int8(i), step)
		r.cloud(s, int8(i), step)
		r.device(s, int8(i), step)
	}
	r.world(s, emit)
}

type stepper func(may bool, what string, do func(*state, *command))

func (r rules) client(s state, i int, step stepper) {
	c, first := s.cmd[i], s.cmd[0]
	ask := func(to *state, c *command) { c.asked, c.stage, c.client = to.now, taken, waiting }
	mayAsk := s.up && c.asked == none && s.now <= lastAsk
	step(mayAsk, "client asks for", ask)
	step(c.client == waiting, "client hangs up on", func(_ *state, c *command) { c.client = cutOff })
	// A retry of a command that is remembered is that command, otherwise a new one.
	remembered := c.recorded && !r.releases(c)
	step(s.up && c.client == cutOff && remembered, "client retries", func(_ *state, c *command) { c.client = waiting })
	forgotten := first.stage == idle && (!first.recorded || r.releases(first)) && first.client != waiting
	step(mayAsk && forgotten, "client retries the first as", func(to *state, c *command) {
		to.same = true
		ask(to, c)
	})
}

// releases says that the requestId of a command that has ended is free again.
func (r rules) releases(c command) bool {
	return c.outcome == failed || r.releasesUnknown && c.outcome == unknown
}

func (r rules) server(s state, i int8, step stepper) {
	c := s.cmd[i]
	if !s.up {
		return
	}
	inTime := s.now < c.expires()
	step(c.stage == taken && !c.recorded && inTime, "server records", func(_ *state, c *command) { c.recorded = true })
	step(c.stage == taken && (c.recorded || r.callsFirst) && c.outcome == pending && inTime, "server calls for", func(_ *state, c *command) {
		c.stage, c.copies = called, c.copies+1
	})
	step(c.stage == taken && !c.recorded && !inTime, "server refuses the late", func(_ *state, c *command) {
		c.stage = idle
		c.answer(got502)
	})
	step(c.stage == called && c.reply == got200, "server hears of the acceptance of", func(_ *state, c *command) {
		c.stage, c.reply = accepted, silent
		if r.acceptedIsOpen {
			c.end(opened)
		}
	})
	step(c.stage == called && c.reply == got502, "server hears of the rejection of", func(_ *state, c *command) { c.end(failed) })
	step(r.hasty502 && c.stage == called && c.reply == silent, "server gives up", func(_ *state, c *command) { c.end(failed) })
	step(r.retriesCalls && c.stage == called && c.reply == silent && c.copies == 1, "SDK repeats the call for", func(_ *state, c *command) { c.copies++ })
	step(r.maySweep(s, c), "server ends the overdue", func(_ *state, c *command) { c.sweep() })
	step(c.report, "server hears the report of", func(_ *state, c *command) {
		c.report = false
		c.end(opened)
	})
	step(c.outcome != pending && s.desired == i && !c.clearing, "server begins to clear", func(_ *state, c *command) { c.clearing = true })
	r.answers(c, step)
}

// answers: first what is durable, then what the process knows.
func (r rules) answers(c command, step stepper) {
	good := c.outcome == opened || c.outcome == expired || c.outcome == pending && c.stage == accepted
	early := r.answersFirst && c.stage == taken
	step(c.client == waiting && (c.recorded && good || early), "server answers 200 for", func(_ *state, c *command) { c.answer(got200) })
	bad := c.outcome == failed || c.outcome == unknown
	step(c.client == waiting && bad, "server answers 502 for", func(_ *state, c *command) { c.answer(got502) })
}

func (c *command) answer(a int8) {
	if c.client == waiting {
		c.client = a
		c.told502 = c.told502 || a == got502
	}
}

// end records the one outcome; what comes later changes none.
func (c *command) end(o int8) {
	if c.recorded && c.outcome == pending {
		c.outcome, c.overdue = o, 0
	}
	c.reply = silent
	if c.stage != accepted {
		c.stage = idle
	}
}

func (r rules) maySweep(s state, c command) bool {
	return c.overdueAt(s) && !(r.waitsForReply && c.stage == called)
}

func (c command) overdueAt(s state) bool {
	return s.up && c.recorded && c.outcome == pending && s.now >= c.expires()+skew
}

func (c *command) sweep() {
	switch c.stage {
	case taken:
		c.end(failed)
	case called:
		c.end(unknown)
	default:
		c.end(expired)
	}
}

// cloud is the shadow. It may apply a call long after everybody has given up.
func (r rules) cloud(s state, i int8, step stepper) {
	c := s.cmd[i]
	reply := func(c *command, a int8) {
		if c.stage == called {
			c.reply = a
		}
	}
	step(c.copies > 0, "cloud takes the call for", func(to *state, c *command) {
		c.copies--
		if c.applied { // its version has moved on: 409
			reply(c, got502)
			return
		}
		c.applied, to.desired = true, i
		reply(c, got200)
	})
	step(c.copies > 0 && !c.applied, "cloud rejects the call for", func(_ *state, c *command) {
		c.copies--
		reply(c, got502)
	})
	step(c.clearing, "cloud takes the clear of", func(to *state, c *command) {
		c.clearing = false
		if to.desired == i || r.clearsAnything {
			to.wiped = to.desired != i && to.desired != none
			to.desired = none
		}
	})
}

// device is offline whenever nothing reaches it. What it would pass over anyway
// is not brought to it: that spares the search many states and hides none that
// matters.
func (r rules) device(s state, i int8, step stepper) {
	c := s.cmd[i]
	valid := s.now-skew < c.expires()
	step(s.desired == i && s.message != i && !c.seen && (valid || r.ignoresExpiry), "delta or get carries", func(to *state, _ *command) { to.message = i })
	step(s.message == i, "device receives", func(to *state, c *command) {
		to.message = none
		if !c.seen && (valid || r.ignoresExpiry) {
			to.bolt = i
		}
	})
	step(s.bolt == i, "bolt is to move for", func(to *state, c *command) {
		to.bolt = none
		if !c.seen && (valid || r.ignoresExpiry || r.checksEarly) {
			c.seen, c.report = true, true
			c.moved++
			c.late = to.now > c.expires()+skew
			c.afterwards = c.told502
		}
	})
}

func (r rules) world(s state, emit func(action, state)) {
	if s.up {
		emit(action{"server crashes", none}, s.crashed())
	} else {
		emit(action{"server starts", none}, r.started(s))
	}
	if to := r.rebooted(s); to != s {
		emit(action{"device reboots", none}, to)
	}
	if s.now < lastTick && !r.owes(s) {
		emit(action{"time passes", none}, s.later())
	}
}

func (s state) crashed() state {
	s.up = false
	for i := range s.cmd {
		c := &s.cmd[i]
		c.stage, c.reply = idle, silent
		if c.client == waiting {
			c.client = cutOff
		}
	}
	return s
}

// started is a server that has ended what an earlier run left unfinished.
func (r rules) started(s state) state {
	s.up = true
	for i := range s.cmd {
		c := &s.cmd[i]
		if !c.recorded || c.outcome != pending {
			continue
		}
		if r.recoverySends && s.now < c.expires() && c.copies < 2 {
			c.stage, c.copies = called, c.copies+1
		} else {
			c.end(expired)
		}
	}
	return s
}

func (r rules) rebooted(s state) state {
	s.bolt = none
	for i := range s.cmd {
		s.cmd[i].seen = s.cmd[i].seen && !r.forgets
	}
	return s
}

// owes says that the sweeper, which runs within the grace, must run before time
// passes.
func (r rules) owes(s state) bool {
	for _, c := range s.cmd {
		if c.overdue == grace && r.maySweep(s, c) {
			return true
		}
	}
	return false
}

func (s state) later() state {
	for i := range s.cmd {
		if s.cmd[i].overdueAt(s) {
			s.cmd[i].overdue++
		}
	}
	s.now++
	return s
}
