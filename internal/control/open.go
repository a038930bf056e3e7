package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/openlock/openlock/internal/access"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/shadow"
	"github.com/openlock/openlock/internal/store"
)

// OpenRequest is what is asked with an open.
type OpenRequest struct {
	RequestID string // the caller's tracking id, "" for none
	Reason    string
	Expiry    time.Duration // that it lives from the receipt of the request; 0: as its organization has it
}

// Command is a command as it may be shown.
type Command struct {
	ID        lock.CommandID
	Lock      lock.ID
	IssuedAt  time.Time
	ExpiresAt time.Time
	Outcome   lock.Outcome // Result is lock.Pending until it has ended

	flight *flight // nil when it has ended
}

// flight is a command under way, as this node knows it.
type flight struct {
	id     lock.CommandID
	lock   lock.ID
	until  clock.Deadline
	acked  atomic.Bool
	lost   atomic.Pointer[lock.End] // how it ends, when it was recorded and could not be sent
	ending atomic.Bool              // somebody is recording its end
	done   chan struct{}            // closed once outcome is set
	// outcome may be read after done is closed.
	outcome lock.Outcome
	row     store.CommandRow
	keys    []store.RepeatKey
}

// Open records that the door is to open and tells the device. The answer says
// that it was sent, not that it is open. Refuses as Do does, and with
// ErrTooMany, and ErrNotSent together with an answer that names the event and
// how the command ended: that command can no longer open the door.
func (c *Control) Open(ctx context.Context, r Request, o OpenRequest) (Answer, error) {
	if c.crowding(r.Lock) != nil {
		if _, err := c.Lock(ctx, r.By, r.Lock, access.Open); err != nil {
			return Answer{}, err // who may not open need not wait
		}
		c.awaitRoom(ctx, r.Lock)
	}
	ctx = context.WithoutCancel(ctx) // who goes away does not cancel a command
	defer c.locks.Lock(r.Lock)()
	return again(func() (Answer, error) { return c.open(ctx, r, o) })
}

func (c *Control) open(ctx context.Context, r Request, o OpenRequest) (Answer, error) {
	state, err := c.load(ctx, r.Lock)
	if err != nil {
		return Answer{}, err
	}
	right, err := Authorize(r.By.Subject, access.Open, state)
	if err != nil {
		return Answer{}, err
	}
	keys, prior, err := c.repeats(ctx, r, &o)
	if err != nil {
		return Answer{}, err
	}
	if prior != nil {
		return c.replay(ctx, r, keys, *prior)
	}
	if len(state.Pending) >= pendingMost {
		return Answer{}, ErrTooMany
	}
	return c.newCommand(ctx, r, o, state, right, keys)
}

// newCommand decides, records and sends one new command.
func (c *Control) newCommand(ctx context.Context, r Request, o OpenRequest, state lock.State, right access.Right, keys []store.Repeat) (Answer, error) {
	expiry, err := c.expiryOf(ctx, o, state)
	if err != nil {
		return Answer{}, err
	}
	until := r.Received.Add(expiry)
	open := lock.Open{
		ID: lock.CommandID(c.newID()), Right: string(right),
		IssuedAt: r.Received.Wall.UnixMilli(), ExpiresAt: until.Wall.UnixMilli(),
	}
	events, err := lock.Decide(state, lock.RequestOpen{Open: open, Reason: o.Reason, RequestID: o.RequestID}, c.clock.Wall())
	if err != nil {
		return Answer{}, err
	}
	fl := &flight{id: open.ID, lock: state.ID, until: until, done: make(chan struct{}), keys: repeatKeys(keys)}
	staged, err := c.shadows.Stage(ctx, state.ThingName, shadow.Command{
		ID: string(open.ID), IssuedAt: r.Received.Wall, Until: until, Acked: func() { fl.acked.Store(true) },
	})
	if reason := unsent(err); reason != "" {
		return c.recordUnsent(ctx, r, state, fl, events, reason)
	}
	if err != nil {
		return Answer{}, fmt.Errorf("%w: %w", ErrNotSent, err)
	}
	f := c.fold(state, events, c.meta(r, right))
	fl.row = commandRow(open, f)
	change := f.change(r.standing(c.clock.Wall()))
	change.Commands = []store.CommandRow{fl.row}
	change.Remember = remember(keys, f, http.StatusOK, string(open.ID))
	change.Shadows = []shadow.Row{staged.Row()}
	records, err := c.db.Commit(ctx, change)
	if err != nil {
		staged.Drop()
		return Answer{}, unrecorded(err)
	}
	c.took(fl)
	answer := Answer{Status: http.StatusOK, Lock: state.ID, Version: f.after.Version, Event: &records[0]}
	if err := staged.Send(); err != nil {
		return c.takeBack(ctx, answer, fl, err)
	}
	answer.Command = fl.view()
	return answer, nil
}

// expiryOf is how long an open lives: by the request, else by the lock's
// organization, else by the server.
func (c *Control) expiryOf(ctx context.Context, o OpenRequest, state lock.State) (time.Duration, error) {
	if o.Expiry > 0 || state.OrgID == "" {
		return cmp.Or(o.Expiry, c.settings.Expiry), nil
	}
	org, err := c.db.Organization(ctx, state.OrgID)
	if err != nil {
		return 0, fmt.Errorf("organization of lock %s: %w", state.ID, err)
	}
	return cmp.Or(org.OpenExpiry, c.settings.Expiry), nil
}

// unsent says why a command cannot be sent, "" if it can or for other errors.
func unsent(err error) string {
	var no *shadow.Error
	switch {
	case errors.Is(err, shadow.ErrOffline):
		return "offline"
	case errors.Is(err, shadow.ErrTooLate):
		return "too_late"
	case errors.As(err, &no):
		return "shadow_full" // the device's own state leaves no room for it
	}
	return ""
}

// recordUnsent records that the door was asked for and could not be told. The
// desired state is not touched and no key is remembered, so that a retry runs.
func (c *Control) recordUnsent(ctx context.Context, r Request, state lock.State, fl *flight, events []lock.Event, reason string) (Answer, error) {
	asked := c.fold(state, events, c.meta(r, ""))
	end, err := lock.Decide(asked.after, lock.End{CommandID: fl.id, Result: lock.Failed, Reason: reason, Delivered: lock.DeliveredNo}, c.clock.Wall())
	if err != nil {
		return Answer{}, err
	}
	ended := c.fold(asked.after, end, serverMeta)
	both := folded{before: state, after: ended.after, at: asked.at, events: append(asked.events, ended.events...)}
	fl.row = commandRow(asked.after.Pending[len(asked.after.Pending)-1], asked)
	fl.outcome = end[0].(lock.OpenEnded).Outcome
	close(fl.done)
	change := both.change(r.standing(c.clock.Wall()))
	change.Commands = []store.CommandRow{fl.ended(c.clock.Steady())}
	records, err := c.db.Commit(ctx, change)
	if err != nil {
		return Answer{}, unrecorded(err)
	}
	return Answer{Lock: state.ID, Version: ended.after.Version, Event: &records[0], Command: fl.view()},
		fmt.Errorf("%w: %s", ErrNotSent, reason)
}

// unrecorded is a commit's error: unless it says how to go on, nothing was and
// nothing will be sent.
func unrecorded(err error) error {
	for _, known := range []error{event.ErrConflict, store.ErrRepeat, store.ErrRevoked} {
		if errors.Is(err, known) {
			return err
		}
	}
	return fmt.Errorf("%w: %w", ErrNotSent, err)
}

// takeBack ends a command that was recorded but could not be sent. The shadow
// already shows it to nobody; this records so.
func (c *Control) takeBack(ctx context.Context, a Answer, fl *flight, cause error) (Answer, error) {
	reason := unsent(cause)
	fl.lost.Store(&lock.End{CommandID: fl.id, Result: lock.Failed, Reason: reason, Delivered: lock.DeliveredNo})
	if err := c.finish(ctx, fl); err != nil { // the sweeper tries again
		c.log.Error("a command that was not sent could not be closed yet", "command", fl.id, "lock", fl.lock, "error", err)
	}
	a.Command = fl.view()
	return a, fmt.Errorf("%w: %s", ErrNotSent, reason)
}

// finish records the end of a command whose device has not spoken. The caller
// holds the lock.
func (c *Control) finish(ctx context.Context, fl *flight) error {
	if lost := fl.lost.Load(); lost != nil {
		return c.end(ctx, fl.lock, *lost, fl.id, serverMeta, fl.keys) // a retry is to run
	}
	delivered := lock.DeliveredUnknown
	if fl.acked.Load() {
		delivered = lock.DeliveredYes
	}
	return c.end(ctx, fl.lock, lock.End{CommandID: fl.id, Result: lock.Expired, Delivered: delivered}, fl.id, serverMeta, nil)
}

func commandRow(o lock.Open, f folded) store.CommandRow {
	return store.CommandRow{
		ID: string(o.ID), Lock: int64(f.after.ID), Version: f.after.Version,
		IssuedAt: time.UnixMilli(o.IssuedAt), ExpiresAt: time.UnixMilli(o.ExpiresAt),
	}
}

// ended is the row of a command whose outcome is known.
func (f *flight) ended(at time.Time) store.CommandRow {
	row := f.row
	row.EndedAt, row.Outcome = at, mustJSON(f.outcome)
	return row
}

func (f *flight) view() *Command {
	v := &Command{
		ID: f.id, Lock: f.lock, IssuedAt: f.row.IssuedAt, ExpiresAt: f.row.ExpiresAt,
		Outcome: lock.Outcome{Result: lock.Pending, ConfirmedBy: "nobody"}, flight: f,
	}
	select {
	case <-f.done:
		v.Outcome, v.flight = f.outcome, nil
	default:
		if lost := f.lost.Load(); lost != nil {
			v.Outcome = lock.Outcome{Result: lost.Result, Reason: lost.Reason, ConfirmedBy: "nobody", Delivered: lost.Delivered}
		}
	}
	return v
}

// Await waits until the command has ended, its time is over, or ctx is done,
// and answers with what is known then.
func (c *Control) Await(ctx context.Context, cmd *Command) *Command {
	if cmd.flight == nil {
		return cmd
	}
	expiry := time.NewTimer(max(0, c.clock.Left(cmd.flight.until)))
	defer expiry.Stop()
	select {
	case <-cmd.flight.done:
	case <-expiry.C:
	case <-ctx.Done():
	}
	return cmd.flight.view()
}

// command reads one command as it is now.
func (c *Control) command(ctx context.Context, id lock.ID, cmd lock.CommandID) (*Command, error) {
	if f := c.flight(id, cmd); f != nil {
		return f.view(), nil
	}
	row, err := c.db.Command(ctx, int64(id), string(cmd))
	if err != nil {
		return nil, err
	}
	return viewRow(row)
}

func viewRow(row store.CommandRow) (*Command, error) {
	v := &Command{
		ID: lock.CommandID(row.ID), Lock: lock.ID(row.Lock), IssuedAt: row.IssuedAt, ExpiresAt: row.ExpiresAt,
		Outcome: lock.Outcome{Result: lock.Pending, ConfirmedBy: "nobody"},
	}
	if row.Outcome == nil {
		return v, nil
	}
	return v, json.Unmarshal(row.Outcome, &v.Outcome)
}

// awaitRoom lets a device that is slower than its callers catch up.
func (c *Control) awaitRoom(ctx context.Context, id lock.ID) {
	ctx, cancel := context.WithTimeout(ctx, roomWithin)
	defer cancel()
	for {
		oldest := c.crowding(id)
		if oldest == nil {
			return
		}
		select {
		case <-oldest.done:
		case <-ctx.Done():
			return
		}
	}
}

// crowding is the oldest command of a lock that has too many, nil if not.
func (c *Control) crowding(id lock.ID) (oldest *flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.flights[id]) < roomWanted {
		return nil
	}
	for _, f := range c.flights[id] {
		if oldest == nil || f.id < oldest.id {
			oldest = f
		}
	}
	return oldest
}

func (c *Control) took(f *flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flights[f.lock] == nil {
		c.flights[f.lock] = map[lock.CommandID]*flight{}
	}
	c.flights[f.lock][f.id] = f
}

// landed tells whoever waits for a command.
func (c *Control) landed(id lock.ID, cmd lock.CommandID, o lock.Outcome) {
	c.mu.Lock()
	f := c.flights[id][cmd]
	delete(c.flights[id], cmd)
	if len(c.flights[id]) == 0 {
		delete(c.flights, id)
	}
	c.mu.Unlock()
	if f != nil {
		f.outcome = o
		close(f.done)
	}
}

func (c *Control) flight(id lock.ID, cmd lock.CommandID) *flight {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flights[id][cmd]
}
