// Package clock tells the two times that safety needs: what the world says it
// is, and how long it has really been.
package clock

import "time"

// Clock is where time comes from.
type Clock struct {
	// Wall is the time of day, UTC. It may be stepped by its keeper. Deadlines on
	// the wire and expiry of credentials go by it.
	Wall func() time.Time
	// Steady is the time of day at the start of the process plus the time that has
	// passed since. It is never stepped, so spans measured by it are true.
	Steady func() time.Time
}

// System is the machine's clock.
func System() Clock {
	start := time.Now() // carries a monotonic reading
	base := start.UTC().Round(0)
	return Clock{
		Wall:   func() time.Time { return time.Now().UTC().Round(0) },
		Steady: func() time.Time { return base.Add(time.Since(start)) },
	}
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
