package device

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Skew is how far a synchronised device's clock may be from the server's: the
// s of invariant 1.
const Skew = 2 * time.Second

const (
	resolution = time.Second      // a shadow's timestamp is cut to whole seconds
	drift      = 10_000           // a monotonic clock errs by at most one part in this many (100 ppm)
	fresh      = 10 * time.Second // how long the answer to a get counts as just asked for
	minBattery = 5                // percent; below it the bolt might stop half way
)

// A Command is one request to open the door. On the wire it is the array
// [id, issuedAt, expiresAt], with the times in epoch milliseconds of the
// server's clock.
type Command struct {
	ID        string // names this one opening, for example "01JZ8Q4T7H"
	IssuedAt  time.Time
	ExpiresAt time.Time // the first instant at which the door must not open any more
}

var errMalformed = errors.New("device: not a command: want [id, issuedAt, expiresAt]")

// UnmarshalJSON accepts a command's array and nothing else: a lock guesses
// nothing. It fails on a missing, additional or mistyped element, an empty id,
// and a command that would expire before it was issued.
func (c *Command) UnmarshalJSON(b []byte) error {
	var array []json.RawMessage
	if err := json.Unmarshal(b, &array); err != nil || len(array) != 3 {
		return errMalformed
	}
	var id *string
	var issued, expires *int64
	for i, into := range []any{&id, &issued, &expires} {
		if err := json.Unmarshal(array[i], into); err != nil {
			return fmt.Errorf("%w: element %d: %w", errMalformed, i, err)
		}
	}
	if id == nil || *id == "" || issued == nil || expires == nil || *issued >= *expires {
		return errMalformed
	}
	*c = Command{*id, time.UnixMilli(*issued), time.UnixMilli(*expires)}
	return nil
}

// MarshalJSON writes the array back as it was received, so that the shadow
// finds reported.open equal to desired.open and repeats no delta.
func (c Command) MarshalJSON() ([]byte, error) {
	return json.Marshal([]any{c.ID, c.IssuedAt.UnixMilli(), c.ExpiresAt.UnixMilli()})
}

// A Reading is what the answer to one of the device's own gets tells about the
// server's clock. Both durations are measured on a monotonic clock, one that
// keeps counting while the processor sleeps.
type Reading struct {
	Timestamp   time.Time     // the answer's timestamp, cut to a whole second
	SinceSent   time.Duration // since the get left
	SinceAnswer time.Duration // since its answer arrived
}

// Latest is later than everything that the server's clock can show now: the
// answer may have been written as soon as the get was sent, at the very end of
// the second that it names, and the device's own clock may run slow.
func (r Reading) Latest() time.Time {
	return r.Timestamp.Add(resolution + r.SinceSent + r.SinceSent/drift)
}

// Earliest is the earliest that the server's clock can show now.
func (r Reading) Earliest() time.Time {
	return r.Timestamp.Add(r.SinceAnswer - r.SinceAnswer/drift)
}

// Synchronised says whether r proves a wall clock that shows now to be within
// Skew of the server's. An old reading proves less and less.
func (r Reading) Synchronised(now time.Time) bool {
	return r.Latest().Sub(now) <= Skew && now.Sub(r.Earliest()) <= Skew
}

// A Situation is all that a decision depends on besides the command itself.
type Situation struct {
	Seen       bool      // the command's id is in the device's memory
	Withdrawn  bool      // a get sent after the command arrived left it out
	Now        time.Time // the device's wall clock
	ClockLost  bool      // the wall clock is known to mean nothing
	Reading    *Reading  // the last answer to a get; nil if there is none
	Unanswered bool      // a get was sent for this command, in vain
	Jammed     bool
	Battery    int // percent
}

// serverTime is the time to hold against a command's own times, if the device
// can tell it: its wall clock while that is synchronised, otherwise the bound
// from a get which it has just sent itself.
func (s Situation) serverTime() (now time.Time, known bool) {
	switch {
	case s.Reading == nil:
		return time.Time{}, false
	case !s.ClockLost && s.Reading.Synchronised(s.Now):
		return s.Now, true
	case s.Reading.SinceSent <= fresh:
		return s.Reading.Latest(), true
	}
	return time.Time{}, false
}

// An Action is what a Verdict tells the device to do.
type Action string

// The actions.
const (
	Open   Action = "open"   // move the bolt
	Refuse Action = "refuse" // the command may not open the door; report it refused
	Fail   Action = "fail"   // the lock cannot open the door; report it failed
	Repeat Action = "repeat" // the command was decided before; report its result again
	Ask    Action = "ask"    // send a get and decide again when it was answered
)

// A Reason says why a command did not open the door; it is reported as
// openResult.reason.
type Reason string

// The reasons.
const (
	ReasonExpired             Reason = "expired"              // refused
	ReasonIssuedInFuture      Reason = "issued_in_future"     // refused: a clock was set back
	ReasonClockUnsynchronised Reason = "clock_unsynchronised" // refused: its age cannot be told
	ReasonWithdrawn           Reason = "withdrawn"            // refused: the shadow holds it no more
	ReasonJammed              Reason = "jammed"               // failed
	ReasonLowBattery          Reason = "low_battery"          // failed
	ReasonSuperseded          Reason = "superseded"           // failed: a newer command came first
	ReasonInterrupted         Reason = "interrupted"          // failed: the power went while the bolt was to move
)

// A Verdict is a decision, with the reason of a Refuse or Fail.
type Verdict struct {
	Action Action
	Reason Reason
}

// Decide is the rule of the lock. It is asked when a command arrives, and again
// when the bolt is about to move: only that second Open may move the bolt.
func Decide(c Command, s Situation) Verdict {
	if s.Seen {
		return Verdict{Action: Repeat}
	}
	now, known := s.serverTime()
	switch {
	case !known && s.Unanswered:
		return Verdict{Refuse, ReasonClockUnsynchronised}
	case !known:
		return Verdict{Action: Ask}
	case c.IssuedAt.After(now.Add(Skew)):
		// Without this, setting the server's clock back would revive the command.
		return Verdict{Refuse, ReasonIssuedInFuture}
	case !now.Before(c.ExpiresAt):
		return Verdict{Refuse, ReasonExpired}
	case s.Withdrawn:
		return Verdict{Refuse, ReasonWithdrawn}
	case s.Jammed:
		return Verdict{Fail, ReasonJammed}
	case s.Battery < minBattery:
		return Verdict{Fail, ReasonLowBattery}
	}
	return Verdict{Action: Open}
}
