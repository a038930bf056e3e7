package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/shadow"
	"github.com/openlock/openlock/internal/store"
)

// serverMeta stands beside what the server records of its own accord.
var serverMeta = event.Meta{Actor: "server"}

// Report takes what a device says about a command. It must be called only for
// the device's own authenticated connection. A report about a command that the
// lock does not know, and a repetition, change nothing.
func (c *Control) Report(ctx context.Context, thing string, r shadow.Report) error {
	id, err := lock.OfThing(thing)
	if err != nil {
		return nil // a thing that is no lock has a shadow, but no commands
	}
	ctx = context.WithoutCancel(ctx)
	defer c.locks.Lock(id)()
	report := lock.Report{CommandID: lock.CommandID(r.ID), Result: lock.Result(r.Result), Reason: r.Reason, At: r.At}
	return c.end(ctx, id, report, report.CommandID, event.Meta{Actor: "device:" + thing}, nil)
}

// end records the end of a command, clears it out of the desired state if it is
// still there, and tells whoever waits. The caller holds the lock.
func (c *Control) end(ctx context.Context, id lock.ID, cmd lock.Command, command lock.CommandID, m event.Meta, forget []store.RepeatKey) error {
	for range retries {
		err := c.tryEnd(ctx, id, cmd, command, m, forget)
		if !errors.Is(err, event.ErrConflict) {
			return err
		}
	}
	return event.ErrConflict
}

func (c *Control) tryEnd(ctx context.Context, id lock.ID, cmd lock.Command, command lock.CommandID, m event.Meta, forget []store.RepeatKey) error {
	state, err := c.load(ctx, id)
	if err != nil {
		return err
	}
	events, err := lock.Decide(state, cmd, c.clock.Wall())
	if errors.Is(err, lock.ErrUnknown) || err == nil && len(events) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	staged, err := c.shadows.Withdraw(ctx, state.ThingName, string(command))
	if err != nil {
		return err
	}
	change := c.fold(state, events, m).change(store.Standing{})
	change.Forget = forget
	ended, isEnd := events[0].(lock.OpenEnded)
	if isEnd {
		change.Commands = []store.CommandRow{endedRow(command, ended.Outcome, c.clock.Steady())}
	}
	if staged == nil {
		_, err = c.db.Commit(ctx, change)
	} else {
		change.Shadows = []shadow.Row{staged.Row()}
		_, err = c.commitAndSend(ctx, change, staged)
	}
	if err == nil && isEnd {
		c.landed(id, command, ended.Outcome)
	}
	return err
}

// endedRow ends the command's row, which exists.
func endedRow(id lock.CommandID, o lock.Outcome, at time.Time) store.CommandRow {
	return store.CommandRow{ID: string(id), EndedAt: at, Outcome: mustJSON(o)}
}

// Recover ends every command that an earlier run of the server left unfinished,
// in one transaction, and takes it out of its desired state. It sends nothing.
// It must return before any listener opens.
func (c *Control) Recover(ctx context.Context) (ended int, err error) {
	rows, err := c.db.PendingCommands(ctx)
	if err != nil || len(rows) == 0 {
		return 0, err
	}
	byLock := map[lock.ID][]lock.CommandID{}
	for _, r := range rows {
		byLock[lock.ID(r.Lock)] = append(byLock[lock.ID(r.Lock)], lock.CommandID(r.ID))
	}
	var all store.Change
	for _, id := range slices.Sorted(maps.Keys(byLock)) { // so that the log tells it the same way each time
		part, err := c.abandon(ctx, id, byLock[id])
		if err != nil {
			return 0, fmt.Errorf("close unfinished commands of lock %s: %w", id, err)
		}
		all.Appends = append(all.Appends, part.Appends...)
		all.Locks = append(all.Locks, part.Locks...)
		all.Commands = append(all.Commands, part.Commands...)
		all.Shadows = append(all.Shadows, part.Shadows...)
	}
	if _, err := c.db.Commit(ctx, all); err != nil {
		return 0, fmt.Errorf("close unfinished commands: %w", err)
	}
	return len(rows), nil
}

// abandon works out the end of a lock's unfinished commands.
func (c *Control) abandon(ctx context.Context, id lock.ID, commands []lock.CommandID) (store.Change, error) {
	state, err := c.load(ctx, id)
	if err != nil {
		return store.Change{}, err
	}
	var events []lock.Event
	var ended []store.CommandRow
	var shadows []shadow.Row
	for _, cmd := range commands {
		e, err := lock.Decide(state, lock.End{CommandID: cmd, Result: lock.Expired, Reason: "server_restarted", Delivered: lock.DeliveredUnknown}, c.clock.Wall())
		if err != nil {
			return store.Change{}, err
		}
		events = append(events, e...)
		for _, one := range e {
			ended = append(ended, endedRow(cmd, one.(lock.OpenEnded).Outcome, c.clock.Steady()))
		}
		g, err := c.shadows.Withdraw(ctx, state.ThingName, string(cmd))
		if err != nil {
			return store.Change{}, err
		}
		if g != nil {
			shadows = append(shadows, g.Row())
			g.Drop() // nobody is connected yet
		}
	}
	change := c.fold(state, events, serverMeta).change(store.Standing{})
	change.Commands, change.Shadows = ended, shadows
	return change, nil
}

// How often the sweeper looks, and how many commands it ends at a time.
const (
	sweepEvery     = 200 * time.Millisecond
	sweepRowsEvery = 5 * time.Second
	sweepTogether  = 64
)

// Run ends commands whose time is over, until ctx is done.
func (c *Control) Run(ctx context.Context) {
	flights, rows := time.NewTicker(sweepEvery), time.NewTicker(sweepRowsEvery)
	defer flights.Stop()
	defer rows.Stop()
	defer c.sweeping.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-flights.C:
			c.sweep()
		case <-rows.C:
			c.sweepRows(ctx)
		}
	}
}

// sweep begins to end every command whose deadline has passed by more than the
// allowed skew (a report may still be on its way until then), and those that
// could not be sent. It waits for none: a lock that is held up holds up no
// other.
func (c *Control) sweep() {
	for _, f := range c.due() {
		c.finishInTurn(f)
	}
}

// finishInTurn ends a command in the background, unless that is under way or
// enough else is. What does not succeed is tried at the next sweep; nobody is
// shown the command meanwhile.
func (c *Control) finishInTurn(f *flight) {
	if !f.ending.CompareAndSwap(false, true) {
		return
	}
	select {
	case c.turns <- struct{}{}:
		c.sweeping.Go(func() {
			defer func() { <-c.turns }()
			defer f.ending.Store(false)
			if err := c.finishLocked(context.Background(), f); err != nil {
				c.log.Error("a command could not be closed yet", "command", f.id, "lock", f.lock, "error", err)
			}
		})
	default:
		f.ending.Store(false)
	}
}

// finishLocked is finish for who does not hold the lock.
func (c *Control) finishLocked(ctx context.Context, f *flight) error {
	defer c.locks.Lock(f.lock)()
	return c.finish(ctx, f)
}

func (c *Control) due() (due []*flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ofLock := range c.flights {
		for _, f := range ofLock {
			if f.lost.Load() != nil || c.clock.Passed(f.until.Add(c.settings.Skew)) {
				due = append(due, f)
			}
		}
	}
	return due
}

// sweepRows ends overdue commands that no memory of this process knows of.
func (c *Control) sweepRows(ctx context.Context) {
	rows, err := c.db.PendingCommands(ctx)
	if err != nil {
		c.log.Error("look for overdue commands", "error", err)
		return
	}
	overdue := c.clock.Wall().Add(-c.settings.Skew - sweepRowsEvery)
	for _, r := range rows {
		id, cmd := lock.ID(r.Lock), lock.CommandID(r.ID)
		if r.ExpiresAt.Before(overdue) && c.flight(id, cmd) == nil {
			c.finishInTurn(&flight{id: cmd, lock: id})
		}
	}
}

// ForgetRepeats drops remembered calls whose windows are over.
func (c *Control) ForgetRepeats(ctx context.Context) error {
	return c.db.ForgetRepeats(ctx, c.clock.Steady().Add(-headerWindow))
}
