package device

import "time"

// A Kind says what happened in an Event.
type Kind string

// The kinds of events. Opened, Refused and Failed are also the results that the
// device reports.
const (
	Connected    Kind = "connected"     // subscribed; from here on commands arrive
	Disconnected Kind = "disconnected"  // the connection is lost
	Unreachable  Kind = "unreachable"   // an attempt to connect failed; Reason says how
	Commanded    Kind = "command"       // a command arrived for the first time
	Ignored      Kind = "ignored"       // something unreadable arrived; Reason says what
	Asked        Kind = "asked"         // a get was sent, to learn the time
	Opened       Kind = "opened"        // the bolt has moved: the door can be opened
	Refused      Kind = "refused"       // the command may not open the door
	Failed       Kind = "failed"        // the lock could not open the door
	Relocked     Kind = "relocked"      // the bolt is back
	Reported     Kind = "reported"      // the shadow has accepted a report; of CommandID's result, if set
	Unreported   Kind = "report_denied" // the shadow will not have a report; Reason says why
)

// An Event is something that the device did or noticed.
type Event struct {
	At        time.Time // by the device's wall clock
	Kind      Kind
	CommandID string // of the command that it is about, if any
	Reason    string // a Reason, or for a person to read
	State     State  // after the event
}

// A State is what can be seen of the lock from the outside.
type State struct {
	Online       bool // connected and subscribed
	Synchronised bool // its wall clock is proven to be within Skew of the server's
	Locked       bool
	Battery      int // percent
}
