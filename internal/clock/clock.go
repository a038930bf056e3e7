// Package clock tells the two times that safety needs: what the world says it
// is, and how long it has really been.
package clock

import "time"

// Clock is where time comes from.
type Clock struct {
	// Wall is the time of day, UTC. It may be stepped by its keeper. Deadlines on
	// the wire and expiry of credentials go by it.
	Wall func() time.Time
	// Steady only ever goes on, as fast as time does: setting the clock does not
	// touch it. Spans measured by it are true. Its value is near the time of day.
	Steady func() time.Time
}

// Anchor ties steady time to the machine's own uptime, so that it goes on from
// one run of the program to the next, whatever is done to the clock meanwhile.
type Anchor struct {
	Boot   string        `json:"boot"`   // which start of the machine
	Uptime time.Duration `json:"uptime"` // of the machine, when
	Steady time.Time     `json:"steady"` // steady time was this
}

// System is the machine's clock. It continues steady time from an anchor of an
// earlier run, and answers with the anchor for the next: another one after the
// machine was started anew, which is all that can be known then.
func System(last Anchor) (Clock, Anchor) {
	boot, uptime := machine()
	a := last
	if a.Boot == "" || a.Boot != boot {
		a = Anchor{Boot: boot, Uptime: uptime(), Steady: time.Now().UTC().Round(0)}
		if a.Steady.Before(last.Steady) {
			a.Steady = last.Steady
		}
	}
	return Clock{
		Wall:   func() time.Time { return time.Now().UTC().Round(0) },
		Steady: func() time.Time { return a.Steady.Add(uptime() - a.Uptime) },
	}, a
}

// Deadline is a moment by both clocks. It has passed when either says so.
type Deadline struct{ Wall, Steady time.Time }

// In is the deadline after a span from now.
func (c Clock) In(d time.Duration) Deadline {
	return Deadline{Wall: c.Wall().Add(d), Steady: c.Steady().Add(d)}
}

// Add moves a deadline.
func (d Deadline) Add(by time.Duration) Deadline {
	return Deadline{Wall: d.Wall.Add(by), Steady: d.Steady.Add(by)}
}

// Passed says whether a deadline has passed by either clock.
func (c Clock) Passed(d Deadline) bool { return c.Left(d) <= 0 }

// Left is the time until a deadline passes; not positive when it has.
func (c Clock) Left(d Deadline) time.Duration {
	return min(d.Wall.Sub(c.Wall()), d.Steady.Sub(c.Steady()))
}
