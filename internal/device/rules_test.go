package device

import (
	"encoding/json"
	"errors"
	"flag"
	"strconv"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var t0 = time.UnixMilli(1_780_056_000_000)

func sec(n float64) time.Duration { return time.Duration(n * float64(time.Second)) }

func TestCommandIsReadStrictly(t *testing.T) {
	for _, wire := range []string{
		`null`, `{}`, `"a"`, `[]`, `["a",1]`, `["a",1,2,3]`, `["",1,2]`, `[null,1,2]`, `[7,1,2]`,
		`["a",null,2]`, `["a","1",2]`, `["a",1.5,2]`, `["a",1,1e3]`, `["a",2,2]`, `["a",3,2]`, `["a",1,2]x`,
	} {
		var c Command
		if err := c.UnmarshalJSON([]byte(wire)); !errors.Is(err, errMalformed) {
			t.Errorf("%s: %v, %v", wire, c, err)
		}
	}
}

func TestCommandIsEchoedAsReceived(t *testing.T) {
	const wire = `["01JZ8Q4T7H",1780056000000,1780056010000]`
	var c Command
	if err := json.Unmarshal([]byte(wire), &c); err != nil {
		t.Fatal(err)
	}
	if back, err := json.Marshal(c); err != nil || string(back) != wire {
		t.Fatalf("%s, %v", back, err)
	}
}

// TestDecide has a line for each thing that design/protocol.md says a device
// must do, in "What the device must do".
func TestDecide(t *testing.T) {
	command := Command{ID: "c", IssuedAt: t0, ExpiresAt: t0.Add(sec(10))}
	good := func(change func(*Situation)) Situation {
		s := Situation{Now: t0.Add(sec(1)), Reading: &Reading{Timestamp: t0, SinceSent: sec(1), SinceAnswer: sec(1)}, Battery: 100}
		change(&s)
		return s
	}
	at := func(seconds float64) func(*Situation) {
		return func(s *Situation) {
			s.Now = t0.Add(sec(seconds))
			s.Reading.SinceSent, s.Reading.SinceAnswer = sec(seconds), sec(seconds)
		}
	}
	lost := func(seconds float64) func(*Situation) {
		return func(s *Situation) {
			s.ClockLost = true
			s.Reading = &Reading{Timestamp: t0.Add(sec(seconds))}
		}
	}
	for _, test := range []struct {
		must string
		s    Situation
		want Verdict
	}{
		{"open a good command", good(at(1)), Verdict{Action: Open}},
		{"open it up to its expiry", good(at(9.999)), Verdict{Action: Open}},
		{"refuse a command that has expired", good(at(10)), Verdict{Refuse, ReasonExpired}},
		{"refuse a command whose id it has seen", good(func(s *Situation) { s.Seen = true }), Verdict{Action: Repeat}},
		{"repeat the result even of an expired one", good(func(s *Situation) { at(99)(s); s.Seen = true }), Verdict{Action: Repeat}},

		{"not trust a clock that nothing proves", good(func(s *Situation) { s.Reading = nil }), Verdict{Action: Ask}},
		{"not trust a clock that is behind", good(func(s *Situation) { s.Now = s.Now.Add(-sec(1.1)); s.Reading.SinceSent = sec(11) }), Verdict{Action: Ask}},
		{"not trust a clock that is ahead", good(func(s *Situation) { at(11)(s); s.Now = s.Now.Add(sec(2.1)) }), Verdict{Action: Ask}},
		{"not trust a proof for ever", good(func(s *Situation) {
			s.Now, s.Reading = t0.Add(3*time.Hour), &Reading{Timestamp: t0, SinceSent: 3 * time.Hour, SinceAnswer: 3 * time.Hour}
		}), Verdict{Action: Ask}},
		{"refuse while its clock is unsynchronised", good(func(s *Situation) { s.Reading = nil; s.Unanswered = true }), Verdict{Refuse, ReasonClockUnsynchronised}},

		{"bound the age by its own get", good(lost(8.9)), Verdict{Action: Open}},
		{"take the bound at its worst: the end of the second", good(lost(9)), Verdict{Refuse, ReasonExpired}},
		{"count from when the get was sent", good(func(s *Situation) { lost(5)(s); s.Reading.SinceSent = sec(4) }), Verdict{Refuse, ReasonExpired}},
		{"use a get that it has just sent, not an old one", good(func(s *Situation) { lost(-30)(s); s.Reading.SinceSent = sec(10.1) }), Verdict{Action: Ask}},

		{"refuse what comes from the future", good(at(-2.1)), Verdict{Refuse, ReasonIssuedInFuture}},
		{"refuse it by the bound too: the server's clock was set back", good(lost(-3600)), Verdict{Refuse, ReasonIssuedInFuture}},
		{"refuse what the shadow has left out", good(func(s *Situation) { s.Withdrawn = true }), Verdict{Refuse, ReasonWithdrawn}},
		{"report that it is jammed", good(func(s *Situation) { s.Jammed = true }), Verdict{Fail, ReasonJammed}},
		{"report that its battery is low", good(func(s *Situation) { s.Battery = 4 }), Verdict{Fail, ReasonLowBattery}},
		{"say expired before it says jammed", good(func(s *Situation) { at(10)(s); s.Jammed = true }), Verdict{Refuse, ReasonExpired}},
	} {
		if got := Decide(command, test.s); got != test.want {
			t.Errorf("must %s: got %v, want %v", test.must, got, test.want)
		}
	}
}

// Invariant 1: no unlock executes after expiresAt + s, by the server's clock,
// whatever the device's clocks, the network and the age of the last get.
func TestNothingOpensLate(t *testing.T) {
	checks(t, 10_000)
	opened := 0
	rapid.Check(t, func(t *rapid.T) {
		ms := func(from, to int, what string) time.Duration {
			return time.Duration(rapid.IntRange(from, to).Draw(t, what)) * time.Millisecond
		}
		// The truth, by the server's clock:
		issued := t0
		expires := issued.Add(ms(1, 30_000, "lifetime"))
		sent := issued.Add(ms(-20_000, 40_000, "get sent"))
		if rapid.Bool().Draw(t, "old get") {
			sent = sent.Add(-time.Duration(rapid.IntRange(0, 20).Draw(t, "hours")) * time.Hour)
		}
		written := sent.Add(ms(0, 3_000, "way up"))
		arrived := written.Add(ms(0, 3_000, "way down"))
		now := arrived.Add(ms(0, 40_000, "until the bolt"))
		if rapid.Bool().Draw(t, "now near expiry") {
			now = expires.Add(ms(-1_500, 4_000, "around expiry"))
		}
		if now.Before(arrived) {
			t.Skip("the answer has not come")
		}
		// What the device can see of it, with a crystal that errs:
		ppm := time.Duration(rapid.IntRange(-99, 99).Draw(t, "ppm"))
		mono := func(d time.Duration) time.Duration { return d + d/1_000_000*ppm }
		s := Situation{
			Now:       now.Add(ms(-4_000, 4_000, "wall clock off")),
			ClockLost: rapid.Bool().Draw(t, "clock lost"),
			Reading:   &Reading{written.Truncate(time.Second), mono(now.Sub(sent)), mono(now.Sub(arrived))},
			Battery:   100,
		}
		if Decide(Command{"c", issued, expires}, s).Action != Open {
			return
		}
		opened++
		if !now.Before(expires.Add(Skew)) {
			t.Fatalf("opened %v after the expiry", now.Sub(expires))
		}
		if s.ClockLost && !now.Before(expires) {
			t.Fatalf("a bound must be exact, but opened %v after the expiry", now.Sub(expires))
		}
	})
	if opened == 0 {
		t.Fatal("nothing ever opened: the property says nothing")
	}
}

// checks sets how many cases a property is tried with: one about instants needs
// many, to come near the edges.
func checks(t *testing.T, n int) {
	f := flag.Lookup("rapid.checks")
	before := f.Value.String()
	set := func(to string) {
		if err := f.Value.Set(to); err != nil {
			t.Error(err)
		}
	}
	set(strconv.Itoa(n))
	t.Cleanup(func() { set(before) })
}

// A good clock must not be doubted, or each opening costs a round trip more.
func TestAGoodClockIsTrusted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		written := t0.Add(time.Duration(rapid.IntRange(0, 999).Draw(t, "ms")) * time.Millisecond)
		way := time.Duration(rapid.IntRange(0, 400).Draw(t, "one way")) * time.Millisecond
		age := time.Duration(rapid.IntRange(0, 1800).Draw(t, "age")) * time.Second
		r := Reading{written.Truncate(time.Second), age + 2*way, age}
		if !r.Synchronised(written.Add(way + age)) {
			t.Fatal("a clock that is exactly right counts as unsynchronised")
		}
	})
}
