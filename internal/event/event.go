// Package event defines the log: what a record is, how records are appended
// and how they are read in order.
//
// The log is append-only and is the only source of truth about locks. Each
// stream (one aggregate, for example "lock/123") is versioned from 1 without
// gaps; all streams together have one global Position in the order in which
// their appends were committed, so that a reader who has seen position n never
// finds a new record at or below n.
//
// This package knows nothing of locks, tenants' rights or SQL. Engines live in
// store; every engine passes the suite in eventtest.
package event

import (
	"context"
	"encoding/json"
	"errors"
	"time"
)

// Position is a record's place in the whole log, counted from 1 in commit
// order. Zero is before the first record. Positions may have gaps.
type Position int64

// Stream names the records of one aggregate, for example "lock/123".
type Stream string

// ErrConflict says that a stream is not at the version an Append expected.
// Nothing of the append was recorded; load the stream again and decide anew.
var ErrConflict = errors.New("event: stream has moved on")

// New is an event to be recorded. Type and Schema name the shape of Data and
// are chosen by hand: they outlive every Go type.
type New struct {
	Type   string          // for example "LockOpenRequested"
	Schema int             // version of Data's shape, from 1
	Data   json.RawMessage // what happened, as it is shown on the wire
	Meta   Meta
}

// Meta is recorded beside an event and never inside its data: who did it, with
// what, from where and why. It carries names of credentials, never the
// credentials themselves.
type Meta struct {
	Actor      string `json:"actor,omitempty"`      // "user:<uuid>", "service:<id>", "org:<id>", "operator", "device:<thing>", "server"
	Org        string `json:"org,omitempty"`        // organisation the actor acted for
	Credential string `json:"credential,omitempty"` // "key:<id>", "jwt:<issuer>#<jti>", "certificate:<serial>"
	Right      string `json:"right,omitempty"`      // the right that allowed it, see access.Right
	Remote     string `json:"remote,omitempty"`     // network address of the caller
	Agent      string `json:"agent,omitempty"`      // User-Agent, cut to 256 bytes
	Why        string `json:"why,omitempty"`        // reason given by the caller, or by the server for itself
	Request    string `json:"request,omitempty"`    // the caller's tracking id (requestId)
	Command    string `json:"command,omitempty"`    // command that the event belongs to
	IssuedAt   int64  `json:"issuedAt,omitempty"`   // of that command, epoch milliseconds
	ExpiresAt  int64  `json:"expiresAt,omitempty"`  // of that command, epoch milliseconds
}

// Append asks for events at the end of one stream, all or none of them.
type Append struct {
	Stream Stream
	Expect int64  // version the stream must have now; 0 for a stream that must not exist
	Org    string // organisation that the records belong to, "" for none
	Time   time.Time
	Events []New // at least one
}

// Record is an event as the log keeps it.
type Record struct {
	Position Position
	Stream   Stream
	Version  int64 // within the stream, from 1
	Org      string
	Time     time.Time // UTC, milliseconds
	New
}

// Log is the log of one deployment. Implementations are safe for concurrent
// use.
type Log interface {
	// Append records one append and returns its records once they are durable:
	// they survive the loss of the process and, as far as the disk keeps its
	// word, of power. Concurrent appends may share one sync to disk, but one that
	// fails never fails another.
	//
	// Refuses with ErrConflict when the stream is not at Expect. Any other error
	// leaves open whether the append was recorded only when the engine says that
	// it can no longer serve.
	Append(ctx context.Context, a Append) ([]Record, error)

	// Stream reads at most limit records of one stream from version `from` on,
	// oldest first. A stream that does not exist has no records.
	Stream(ctx context.Context, s Stream, from int64, limit int) ([]Record, error)

	// After reads at most limit records of all streams behind a position, in
	// order of position.
	After(ctx context.Context, p Position, limit int) ([]Record, error)

	// Wait returns once there is a record behind p, or with ctx's error. It may
	// return early; read After to see.
	Wait(ctx context.Context, p Position) error
}
