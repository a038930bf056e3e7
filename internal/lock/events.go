package lock

import (
	"encoding/json"
	"fmt"
)

// Event is something that happened to a lock. The exported fields of its
// implementations are its data, as in events.schema.json.
type Event interface {
	// Kind is the event's stored name and the version of its data's shape.
	Kind() (name string, schema int)
}

// Head is what the data of every lock event begins with.
type Head struct {
	LockID    ID     `json:"lockId"`
	UUID      string `json:"uuid"`
	Timestamp string `json:"timestamp"` // UTC, ISO 8601, milliseconds
}

// Created is recorded once, first.
type Created struct {
	Head
	SerialNumber string `json:"serialNumber,omitempty"`
	Keys         []Key  `json:"keys,omitempty"`
	OwnerID      string `json:"ownerId,omitempty"`
	ThingName    string `json:"thingName,omitempty"`
	ThingARN     string `json:"thingArn,omitempty"`
	OrgID        string `json:"-"` // from the record: the organisation that it was created for
}

// OwnerSet names the user who owns the lock from now on.
type OwnerSet struct {
	Head
	UserID string `json:"userId"`
}

// OrganizationSet gives the lock to an organisation.
type OrganizationSet struct {
	Head
	OrgID string `json:"orgId"`
}

// KeyAdded makes a key known to the lock, or replaces the one with its uuid.
type KeyAdded struct {
	Head
	KeyUUID        string `json:"keyUuid"`
	KeyIndexNumber *int64 `json:"keyIndexNumber,omitempty"`
	UserID         string `json:"userId,omitempty"`
}

// KeyRemoved takes a key away.
type KeyRemoved struct {
	Head
	KeyUUID        string `json:"keyUuid"`
	KeyIndexNumber *int64 `json:"keyIndexNumber,omitempty"`
}

// OpenRequested is recorded before anything is sent to the device. The command
// itself lies in the record's metadata.
type OpenRequested struct {
	Head
	Reason    string `json:"reason,omitempty"`
	RequestID string `json:"requestId,omitempty"`
	Command   Open   `json:"-"`
}

// OpenEnded is the one terminal outcome of a command. It is stored under a name
// for each result.
type OpenEnded struct {
	Head
	CommandID CommandID `json:"commandId"`
	Outcome
}

// OpenReportedLate keeps what a device said about a command that had already
// ended. It changes no outcome.
type OpenReportedLate struct {
	Head
	CommandID CommandID `json:"commandId"`
	Outcome
}

// Kind implements Event.
func (Created) Kind() (string, int) { return "LockCreated", 1 }

// Kind implements Event.
func (OwnerSet) Kind() (string, int) { return "OwnerSet", 1 }

// Kind implements Event.
func (OrganizationSet) Kind() (string, int) { return "OrganizationSet", 1 }

// Kind implements Event.
func (KeyAdded) Kind() (string, int) { return "KeyAdded", 1 }

// Kind implements Event.
func (KeyRemoved) Kind() (string, int) { return "KeyRemoved", 1 }

// Kind implements Event.
func (OpenRequested) Kind() (string, int) { return "LockOpenRequested", 1 }

// Kind implements Event.
func (OpenReportedLate) Kind() (string, int) { return "OpenReportedLate", 1 }

// Kind implements Event.
func (e OpenEnded) Kind() (string, int) { return endedNames[e.Result], 1 }

var endedNames = map[Result]string{
	Opened:  "LockOpened",
	Refused: "LockOpenRefused",
	Failed:  "LockOpenFailed",
	Expired: "LockOpenExpired",
}

// Decode reads an event back from the log. org and command come from the
// record, where they lie beside the data.
func Decode(name string, schema int, data []byte, org string, command Open) (Event, error) {
	if schema != 1 {
		return nil, fmt.Errorf("lock: event %s has schema %d, this version reads 1: run a newer openlock", name, schema)
	}
	switch name {
	case "LockCreated":
		e, err := decode[Created](data)
		e.OrgID = org
		return e, err
	case "OwnerSet":
		return decode[OwnerSet](data)
	case "OrganizationSet":
		return decode[OrganizationSet](data)
	case "KeyAdded":
		return decode[KeyAdded](data)
	case "KeyRemoved":
		return decode[KeyRemoved](data)
	case "LockOpenRequested":
		e, err := decode[OpenRequested](data)
		e.Command = command
		return e, err
	case "LockOpened", "LockOpenRefused", "LockOpenFailed", "LockOpenExpired":
		return decode[OpenEnded](data)
	case "OpenReportedLate":
		return decode[OpenReportedLate](data)
	}
	return nil, fmt.Errorf("lock: unknown event %q: run a newer openlock", name)
}

func decode[E any](data []byte) (e E, err error) {
	if err = json.Unmarshal(data, &e); err != nil {
		err = fmt.Errorf("lock: %T: %w", e, err)
	}
	return e, err
}
