package shadow

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/openlock/openlock/internal/clock"
)

// Command is an open on its way to a device. It stands in the desired state as
// the array [id, issuedAt, expiresAt]: an event with an identity, compared
// whole.
type Command struct {
	ID       string
	IssuedAt time.Time      // wall clock
	Until    clock.Deadline // its wall time is expiresAt
	Acked    func()         // called once the device has acknowledged the message
}

func (c Command) array() []any {
	return []any{c.ID, c.IssuedAt.UnixMilli(), c.Until.Wall.UnixMilli()}
}

// Staged is a change of a desired state that has been worked out but not made.
// The thing is held until Send or Drop; one of them must be called.
type Staged struct {
	s             *Service
	free          func()
	a             Address
	before, after Document
	at            time.Time // of after
	command       *Command  // nil for a withdrawal
}

// Stage works out a command for a thing. The caller records Row together with
// the event that asks for it, then calls Send. Refuses with ErrOffline.
func (s *Service) Stage(ctx context.Context, thing string, c Command) (*Staged, error) {
	if !s.bus.Present(thing) {
		return nil, ErrOffline
	}
	return s.stage(ctx, thing, &c, Set("desired", map[string]any{openField: c.array()}))
}

// Withdraw works out the removal of a command from the desired state. It
// answers nil when that does not hold the command: a newer one is left alone.
// From now on the command is shown to nobody, whether the removal is recorded
// or not.
func (s *Service) Withdraw(ctx context.Context, thing, id string) (*Staged, error) {
	s.hide(thing, id)
	g, err := s.stage(ctx, thing, nil, Set("desired", map[string]any{openField: nil}))
	if err != nil {
		return nil, err
	}
	if raw, ok := g.before.Desired(openField); !ok || commandID(raw) != id {
		g.Drop()
		return nil, nil
	}
	return g, nil
}

func (s *Service) stage(ctx context.Context, thing string, c *Command, u Update) (*Staged, error) {
	a := Address{Thing: thing}
	free := s.things.Lock(thing)
	before, err := s.load(ctx, a)
	if err == nil {
		var after Document
		at := s.clock.Wall()
		if after, err = before.Apply(u, at); err == nil {
			return &Staged{s: s, free: free, a: a, before: before, after: after, at: at, command: c}, nil
		}
	}
	free()
	return nil, err
}

// Row is what must be recorded.
func (g *Staged) Row() Row { return row(g.a, g.after) }

// Drop gives the thing free: nothing was recorded.
func (g *Staged) Drop() { g.free() }

// ErrTooLate says that a command's time was over before it could be sent.
var ErrTooLate = errors.New("shadow: the command expired before it could be sent")

// Send tells the device what has been recorded and gives the thing free.
// Refuses with ErrOffline or ErrTooLate when the device could not be told and
// never will be.
func (g *Staged) Send() error {
	defer g.free()
	if g.command != nil {
		if err := g.sendCommand(); err != nil {
			return err
		}
	}
	g.s.document(g.a, g.before, g.after, "", g.at)
	return nil
}

func (g *Staged) sendCommand() error {
	if g.s.clock.Passed(g.command.Until) {
		return ErrTooLate
	}
	delta, _ := g.after.Delta("", g.at)
	g.s.show(g.a.Thing, live{id: g.command.ID, until: g.command.Until})
	err := g.s.bus.Command(g.a.Thing, g.a.Topic("update/delta"), delta, g.command.Until, g.command.Acked)
	if err != nil {
		g.s.hide(g.a.Thing, g.command.ID)
	}
	return err
}

// commandID reads the id out of [id, issuedAt, expiresAt], "" if it is none.
func commandID(raw []byte) string {
	var parts []json.RawMessage
	var id string
	if json.Unmarshal(raw, &parts) != nil || len(parts) != 3 || json.Unmarshal(parts[0], &id) != nil {
		return ""
	}
	return id
}

// errReport tells firmware authors what a report looks like.
var errReport = errors.New(`openResult must be {"id": string, "result": "opened"|"refused"|"failed", "at": epoch milliseconds, "reason"?: up to 128 bytes}`)

func parseReport(raw []byte) (Report, error) {
	var r Report
	if err := json.Unmarshal(raw, &r); err != nil || r.ID == "" || len(r.ID) > 64 || len(r.Reason) > 128 {
		return Report{}, errReport
	}
	switch r.Result {
	case "opened", "refused", "failed":
		return r, nil
	}
	return Report{}, errReport
}
