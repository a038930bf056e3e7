// Package lock is the aggregate: what a lock is, what may be asked of it and
// what came of it. It decides and folds; it never reads a clock, a disk or a
// network. Rights are not its business (see access), nor is delivery (control).
package lock

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// ID is a lock's number, 1 to 2^53-1, so that every JSON client can hold it.
type ID int64

// MaxID is the largest lock number, 2^53-1.
const MaxID ID = 1<<53 - 1

// ErrID says that a string is not a lock id.
var ErrID = errors.New("a lock id is a decimal integer from 1 to 9007199254740991, without sign or leading zero")

// ParseID reads a strict decimal: digits only, no sign, no leading zero.
func ParseID(s string) (ID, error) {
	if s == "" || len(s) > 16 || s[0] == '0' {
		return 0, ErrID
	}
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0, ErrID
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || ID(n) > MaxID {
		return 0, ErrID
	}
	return ID(n), nil
}

func (id ID) String() string { return strconv.FormatInt(int64(id), 10) }

// Thing is the AWS IoT thing name of the lock, for example "lock-123": at the
// same time the MQTT client id and the name in the device's certificate.
func (id ID) Thing() string { return "lock-" + id.String() }

// OfThing finds the lock that a thing name belongs to.
func OfThing(thing string) (ID, error) {
	if len(thing) < 5 || thing[:5] != "lock-" {
		return 0, fmt.Errorf("thing %q is not a lock: its name must be lock-<id>", thing)
	}
	return ParseID(thing[5:])
}

// CommandID identifies one command, for example
// "0190f5d4-7c1e-7b3a-9a53-0d2f4b6c8e10" (a UUID of version 7).
type CommandID string

// Key is a key that the lock knows. Whoever is named by UserID may open.
type Key struct {
	UUID        string `json:"uuid"`
	IndexNumber *int64 `json:"indexNumber,omitempty"`
	UserID      string `json:"userId,omitempty"`
}

// Result is how a command ended, or Pending.
type Result string

// The results a command can have. All but Pending are terminal.
const (
	Pending Result = "pending"
	Opened  Result = "opened"
	Refused Result = "refused" // the device would not, or the right was withdrawn before sending
	Failed  Result = "failed"  // the device could not, or was never sent the command
	Expired Result = "expired" // no report came in time
)

// Delivered says what is known about an expired command reaching its device.
type Delivered string

// What can be known about delivery.
const (
	DeliveredYes     Delivered = "yes"     // the device acknowledged the message
	DeliveredNo      Delivered = "no"      // the message never left
	DeliveredUnknown Delivered = "unknown" // it left, or may have left, unacknowledged
)

// Outcome is the end of a command and how it is known.
type Outcome struct {
	Result      Result    `json:"result"`
	Reason      string    `json:"reason,omitempty"` // "jammed", "low_battery", "offline" …
	ConfirmedBy string    `json:"confirmedBy"`      // "device" or "nobody"
	Delivered   Delivered `json:"delivered,omitempty"`
	DeviceTime  int64     `json:"deviceTime,omitempty"` // epoch ms by the device's clock
}

// Open is a command that has not ended.
type Open struct {
	ID        CommandID `json:"id"`
	Right     string    `json:"right,omitempty"` // see access.Right
	IssuedAt  int64     `json:"issuedAt"`        // epoch ms
	ExpiresAt int64     `json:"expiresAt"`       // epoch ms
}

// Ended is a command that has ended, remembered to recognise late reports.
type Ended struct {
	ID     CommandID `json:"id"`
	Result Result    `json:"result"`
	Late   bool      `json:"late,omitempty"` // a late report has been recorded
}

// endedKept bounds how many ended commands a lock remembers. A report about an
// older one is dropped.
const endedKept = 32

// State is a lock as its events have made it. The zero value is a lock that
// does not exist.
type State struct {
	ID           ID     `json:"id"`
	Version      int64  `json:"version"` // of the last event
	UUID         string `json:"uuid"`
	SerialNumber string `json:"serialNumber,omitempty"`
	OwnerID      string `json:"ownerId,omitempty"`
	OrgID        string `json:"orgId,omitempty"`
	ThingName    string `json:"thingName,omitempty"`
	ThingARN     string `json:"thingArn,omitempty"`
	Keys         []Key  `json:"keys,omitempty"`

	// Versions from which the present owner and the present organisation may
	// read: they see nothing that was recorded for somebody else.
	OwnerSince int64 `json:"ownerSince,omitempty"`
	OrgSince   int64 `json:"orgSince,omitempty"`

	UpdatedAt int64   `json:"updatedAt"` // epoch ms of the last event
	Pending   []Open  `json:"pending,omitempty"`
	Ended     []Ended `json:"ended,omitempty"` // the last few, oldest first
}

// Exists says whether the lock was created.
func (s State) Exists() bool { return s.Version > 0 }

// Holds says whether a user holds a key of the lock, and which.
func (s State) Holds(user string) (Key, bool) {
	i := slices.IndexFunc(s.Keys, func(k Key) bool { return user != "" && k.UserID == user })
	if i < 0 {
		return Key{}, false
	}
	return s.Keys[i], true
}

func (s State) pending(id CommandID) (Open, bool) {
	i := slices.IndexFunc(s.Pending, func(o Open) bool { return o.ID == id })
	if i < 0 {
		return Open{}, false
	}
	return s.Pending[i], true
}

func (s State) ended(id CommandID) (Ended, bool) {
	i := slices.IndexFunc(s.Ended, func(e Ended) bool { return e.ID == id })
	if i < 0 {
		return Ended{}, false
	}
	return s.Ended[i], true
}

func stamp(now time.Time) string { return now.UTC().Format(timeFormat) }

// timeFormat is how times stand on the wire: UTC, ISO 8601, milliseconds.
const timeFormat = "2006-01-02T15:04:05.000Z"
