package lock

import (
	"errors"
	"slices"
	"time"
)

// Refusals of Decide.
var (
	// ErrUnknown says that the lock does not exist.
	ErrUnknown = errors.New("lock does not exist")
	// ErrUnknownKey says that the lock has no such key.
	ErrUnknownKey = errors.New("lock has no such key")
	// ErrKeyTaken says that another key of the lock has the index number.
	ErrKeyTaken = errors.New("another key of the lock has this index number")
)

// Command is something asked of a lock: one of Create, SetOwner,
// SetOrganization, AddKey, RemoveKey, RequestOpen, Report and End.
type Command interface {
	decide(s State, h Head) ([]Event, error)
}

// Decide answers what happens if a lock in state s is asked for a command now:
// the events to record, none when the command changes nothing, or a refusal.
// It is pure.
func Decide(s State, c Command, now time.Time) ([]Event, error) {
	if _, creates := c.(Create); !creates && !s.Exists() {
		return nil, ErrUnknown
	}
	return c.decide(s, Head{LockID: s.ID, UUID: s.UUID, Timestamp: stamp(now)})
}

// Create makes the lock. On a lock that exists it changes nothing.
type Create struct {
	ID           ID
	UUID         string
	SerialNumber string
	OwnerID      string
	OrgID        string
	Keys         []Key
	ThingARN     string
}

func (c Create) decide(s State, h Head) ([]Event, error) {
	if s.Exists() {
		return nil, nil
	}
	seen := map[int64]bool{}
	for _, k := range c.Keys {
		if k.IndexNumber == nil {
			continue
		}
		if seen[*k.IndexNumber] {
			return nil, ErrKeyTaken
		}
		seen[*k.IndexNumber] = true
	}
	h.LockID, h.UUID = c.ID, c.UUID
	return []Event{Created{
		Head: h, SerialNumber: c.SerialNumber, Keys: c.Keys, OwnerID: c.OwnerID,
		ThingName: c.ID.Thing(), ThingARN: c.ThingARN, OrgID: c.OrgID,
	}}, nil
}

// SetOwner names the owner.
type SetOwner struct{ UserID string }

func (c SetOwner) decide(s State, h Head) ([]Event, error) {
	if s.OwnerID == c.UserID {
		return nil, nil
	}
	return []Event{OwnerSet{Head: h, UserID: c.UserID}}, nil
}

// SetOrganization gives the lock to an organisation.
type SetOrganization struct{ OrgID string }

func (c SetOrganization) decide(s State, h Head) ([]Event, error) {
	if s.OrgID == c.OrgID {
		return nil, nil
	}
	return []Event{OrganizationSet{Head: h, OrgID: c.OrgID}}, nil
}

// AddKey makes a key known; a key of the same uuid is replaced.
type AddKey struct{ Key }

func (c AddKey) decide(s State, h Head) ([]Event, error) {
	for _, k := range s.Keys {
		if k.UUID == c.UUID && sameNumber(k.IndexNumber, c.IndexNumber) && k.UserID == c.UserID {
			return nil, nil
		}
		if k.UUID != c.UUID && c.IndexNumber != nil && sameNumber(k.IndexNumber, c.IndexNumber) {
			return nil, ErrKeyTaken
		}
	}
	return []Event{KeyAdded{Head: h, KeyUUID: c.UUID, KeyIndexNumber: c.IndexNumber, UserID: c.UserID}}, nil
}

// RemoveKey takes away the key that has the uuid, if given, and the index
// number, if given.
type RemoveKey struct {
	UUID        string
	IndexNumber *int64
}

func (c RemoveKey) decide(s State, h Head) ([]Event, error) {
	i := slices.IndexFunc(s.Keys, func(k Key) bool {
		return (c.UUID == "" || k.UUID == c.UUID) && (c.IndexNumber == nil || sameNumber(k.IndexNumber, c.IndexNumber))
	})
	if i < 0 {
		return nil, ErrUnknownKey
	}
	return []Event{KeyRemoved{Head: h, KeyUUID: s.Keys[i].UUID, KeyIndexNumber: s.Keys[i].IndexNumber}}, nil
}

func sameNumber(a, b *int64) bool {
	return a == nil && b == nil || a != nil && b != nil && *a == *b
}

// RequestOpen asks for the door. Commands do not exclude each other: each has
// its own record and its own outcome.
type RequestOpen struct {
	Open
	Reason    string
	RequestID string
}

func (c RequestOpen) decide(_ State, h Head) ([]Event, error) {
	return []Event{OpenRequested{Head: h, Reason: c.Reason, RequestID: c.RequestID, Command: c.Open}}, nil
}

// Report is what the device itself says about a command. About one that has
// ended otherwise it is kept once, as OpenReportedLate; a repetition, and a
// report about a command the lock does not know, change nothing.
type Report struct {
	CommandID CommandID
	Result    Result // Opened, Refused or Failed
	Reason    string
	At        int64 // epoch ms by the device's clock
}

func (c Report) decide(s State, h Head) ([]Event, error) {
	out := Outcome{Result: c.Result, Reason: c.Reason, ConfirmedBy: "device", DeviceTime: c.At}
	if _, ok := s.pending(c.CommandID); ok {
		return []Event{OpenEnded{Head: h, CommandID: c.CommandID, Outcome: out}}, nil
	}
	if e, ok := s.ended(c.CommandID); ok && e.Result != c.Result && !e.Late {
		return []Event{OpenReportedLate{Head: h, CommandID: c.CommandID, Outcome: out}}, nil
	}
	return nil, nil
}

// End closes a command without a word from the device: expired, or failed
// because it was never sent. A command that has ended is left as it is.
type End struct {
	CommandID CommandID
	Result    Result // Expired, Failed or Refused
	Reason    string
	Delivered Delivered
}

func (c End) decide(s State, h Head) ([]Event, error) {
	if _, ok := s.pending(c.CommandID); !ok {
		return nil, nil
	}
	return []Event{OpenEnded{Head: h, CommandID: c.CommandID, Outcome: Outcome{
		Result: c.Result, Reason: c.Reason, ConfirmedBy: "nobody", Delivered: c.Delivered,
	}}}, nil
}
