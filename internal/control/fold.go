package control

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// folded is a decision: the lock before it, the events, the lock after it.
type folded struct {
	before, after lock.State
	at            time.Time
	events        []event.New
}

// fold works out what a lock is after events, and what is recorded of them.
func (c *Control) fold(s lock.State, events []lock.Event, m event.Meta) folded {
	f := folded{before: s, after: s, at: c.clock.Wall()}
	for _, e := range events {
		f.after = lock.Evolve(f.after, e, f.after.Version+1, f.at)
		f.events = append(f.events, encode(e, m))
	}
	return f
}

func encode(e lock.Event, m event.Meta) event.New {
	switch e := e.(type) {
	case lock.OpenRequested:
		m.Command, m.IssuedAt, m.ExpiresAt = string(e.Command.ID), e.Command.IssuedAt, e.Command.ExpiresAt
		m.Right, m.Why, m.Request = e.Command.Right, e.Reason, e.RequestID
	case lock.OpenEnded:
		m.Command = string(e.CommandID)
	case lock.OpenReportedLate:
		m.Command = string(e.CommandID)
	}
	name, schema := e.Kind()
	return event.New{Type: name, Schema: schema, Data: mustJSON(e), Meta: m}
}

// change is what records the decision.
func (f folded) change(requires store.Standing) store.Change {
	c := store.Change{Requires: requires}
	if len(f.events) == 0 {
		return c
	}
	c.Appends = []event.Append{{
		Stream: Stream(f.after.ID), Expect: f.before.Version, Org: f.after.OrgID, Time: f.at, Events: f.events,
	}}
	c.Locks = []store.LockRow{{
		ID: int64(f.after.ID), Version: f.after.Version, UUID: f.after.UUID, State: mustJSON(f.after),
	}}
	return c
}

// Refold reads a lock's whole history and folds it anew. The result equals the
// state that is kept beside the log.
func Refold(records []event.Record) (s lock.State, err error) {
	for _, r := range records {
		e, err := lock.Decode(r.Type, r.Schema, r.Data, r.Org, lock.Open{
			ID: lock.CommandID(r.Meta.Command), Right: r.Meta.Right, IssuedAt: r.Meta.IssuedAt, ExpiresAt: r.Meta.ExpiresAt,
		})
		if err != nil {
			return s, err
		}
		if r.Version != s.Version+1 {
			return s, fmt.Errorf("stream %s: version %d follows %d", r.Stream, r.Version, s.Version)
		}
		s = lock.Evolve(s, e, r.Version, r.Time)
	}
	return s, nil
}

// mustJSON marshals our own types, which always can be.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("control: marshal %T: %v", v, err))
	}
	return b
}
