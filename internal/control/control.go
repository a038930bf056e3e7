// Package control is the command path: it loads a lock, checks the caller's
// right, decides, records, and only then sends. It owns the life of every
// command until its one outcome.
//
// The order is the safety: nothing leaves before its event is durable; what
// could not be sent is taken back before anybody is told so; nothing is ever
// sent again.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/openlock/openlock/internal/access"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/keyed"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/shadow"
	"github.com/openlock/openlock/internal/store"
)

var (
	// ErrForbidden says that the caller is known but has no right to this.
	ErrForbidden = errors.New("no right to do this")
	// ErrMismatch says that a requestId or Idempotency-Key was used before for
	// something else.
	ErrMismatch = errors.New("key was used for another request")
	// ErrTooMany says that a lock has too many commands under way.
	ErrTooMany = errors.New("too many commands under way")
	// ErrNotSent says that a command was not sent and cannot open the door; a retry
	// is safe.
	ErrNotSent = errors.New("command was not sent")
)

// Bounds of the commands that a lock can have under way: from roomWanted on a
// further one waits up to roomWithin for the device to catch up; pendingMost is
// never exceeded.
const (
	roomWanted  = 32
	roomWithin  = 5 * time.Second
	pendingMost = 256
)

// retries bounds how often a decision is made anew because another node
// changed the lock meanwhile.
const retries = 5

// ARNPrefix is what a thing's name is appended to in AWS-style names. A region
// and account of AWS's own would be a lie.
const ARNPrefix = "arn:aws:iot:local:000000000000:thing/"

// Settings of the command path.
type Settings struct {
	Expiry time.Duration // of an open, from the receipt of the request
	Skew   time.Duration // that clocks of devices may be off; reports are awaited this much longer
	Window time.Duration // after an outcome in which a requestId is still the same command
}

// DefaultSettings are those of the protocol.
var DefaultSettings = Settings{Expiry: 10 * time.Second, Skew: 2 * time.Second, Window: time.Minute}

// headerWindow is how long an Idempotency-Key is remembered.
const headerWindow = 24 * time.Hour

// Control is the command path of one node.
type Control struct {
	db       *store.DB
	shadows  *shadow.Service
	clock    clock.Clock
	log      *slog.Logger
	settings Settings
	newID    func() string // of commands; sorts by time

	locks keyed.Mutex[lock.ID]

	sweeping sync.WaitGroup
	turns    chan struct{} // slots of what sweeps

	mu      sync.Mutex
	flights map[lock.ID]map[lock.CommandID]*flight
}

// New makes the command path. Call Recover before anything may arrive.
func New(db *store.DB, c clock.Clock, log *slog.Logger, s Settings, newID func() string) *Control {
	return &Control{
		db: db, clock: c, log: log, settings: s, newID: newID,
		turns: make(chan struct{}, sweepTogether), flights: map[lock.ID]map[lock.CommandID]*flight{},
	}
}

// Use sets the way to the devices. The two know each other: outcomes come back
// through Report.
func (c *Control) Use(s *shadow.Service) { c.shadows = s }

// Request is what every call carries.
type Request struct {
	By             auth.Principal
	Lock           lock.ID
	Remote, Agent  string         // where the call came from
	Received       clock.Deadline // when
	IdempotencyKey string         // "" for none
	Fingerprint    []byte         // of method, path and body, for IdempotencyKey
}

// Answer is what became of a call.
type Answer struct {
	Status   int // http.StatusOK or http.StatusCreated
	Lock     lock.ID
	Version  int64         // of the lock after the call
	Event    *event.Record // nil when nothing changed
	Replayed bool          // the call was a repetition; this is the first one's answer
	Command  *Command      // of an open
}

// Do runs any command but an open. Refuses with ErrForbidden, ErrMismatch,
// auth.ErrUnauthenticated (a right was revoked meanwhile), and what lock.Decide
// refuses.
func (c *Control) Do(ctx context.Context, r Request, cmd lock.Command) (Answer, error) {
	ctx = context.WithoutCancel(ctx) // who goes away does not leave half of it undone
	defer c.locks.Lock(r.Lock)()
	return again(func() (Answer, error) { return c.do(ctx, r, cmd) })
}

func (c *Control) do(ctx context.Context, r Request, cmd lock.Command) (Answer, error) {
	state, err := c.load(ctx, r.Lock)
	if err != nil {
		return Answer{}, err
	}
	right, err := authorizeCommand(r.By.Subject, cmd, state)
	if err != nil {
		return Answer{}, err
	}
	keys, prior, err := c.repeats(ctx, r, nil)
	if err != nil {
		return Answer{}, err
	}
	if prior != nil {
		return c.replay(ctx, r, keys, *prior)
	}
	events, err := lock.Decide(state, cmd, c.clock.Wall())
	if err != nil {
		return Answer{}, err
	}
	f := c.fold(state, events, c.meta(r, right))
	answer := Answer{Status: http.StatusOK, Lock: r.Lock, Version: f.after.Version}
	if f.before.Version == 0 {
		answer.Status = http.StatusCreated
	}
	change := f.change(r.standing(c.clock.Wall()))
	change.Remember = remember(keys, f, answer.Status, "")
	records, err := c.commitWithdrawing(ctx, f, change)
	if err != nil {
		return Answer{}, err
	}
	if len(records) > 0 {
		answer.Event = &records[0]
	}
	return answer, nil
}

// commitWithdrawing records a change and takes a command that is under way out
// of the desired state when the right that carried it is gone. Its outcome
// stays open: withdrawing proves nothing about a door that was already told.
func (c *Control) commitWithdrawing(ctx context.Context, f folded, change store.Change) ([]event.Record, error) {
	if len(change.Appends) == 0 && len(change.Remember) == 0 {
		return nil, nil
	}
	facts := Facts(f.after)
	for _, open := range f.after.Pending {
		if access.Stands(access.Right(open.Right), facts) {
			continue
		}
		g, err := c.shadows.Withdraw(ctx, f.after.ThingName, string(open.ID))
		if err != nil {
			return nil, err
		}
		if g != nil { // a desired state holds one command: this was it
			change.Shadows = append(change.Shadows, g.Row())
			return c.commitAndSend(ctx, change, g)
		}
	}
	return c.db.Commit(ctx, change)
}

// commitAndSend records a change with a staged withdrawal, then publishes it.
func (c *Control) commitAndSend(ctx context.Context, change store.Change, g *shadow.Staged) ([]event.Record, error) {
	records, err := c.db.Commit(ctx, change)
	if err != nil {
		g.Drop()
		return nil, err
	}
	return records, g.Send()
}

// authorizeCommand finds the right that allows a command on a lock.
func authorizeCommand(s access.Subject, cmd lock.Command, state lock.State) (access.Right, error) {
	if _, creates := cmd.(lock.Create); creates && !state.Exists() {
		if !access.MayCreate(s) {
			return "", ErrForbidden
		}
		return "", nil
	}
	return Authorize(s, access.Manage, state)
}

// Authorize finds the right that allows an action on a lock. Refuses with
// lock.ErrUnknown and ErrForbidden.
func Authorize(s access.Subject, a access.Action, state lock.State) (access.Right, error) {
	if !state.Exists() {
		return "", lock.ErrUnknown
	}
	right, ok := access.May(s, a, Facts(state))
	if !ok {
		return "", ErrForbidden
	}
	return right, nil
}

// Facts are what access needs to know of a lock.
func Facts(s lock.State) access.Lock {
	l := access.Lock{Owner: s.OwnerID, Org: s.OrgID}
	for _, k := range s.Keys {
		if k.UserID != "" {
			l.Keys = append(l.Keys, access.Holder{Key: k.UUID, User: k.UserID})
		}
	}
	return l
}

// Lock reads a lock for somebody. Refuses with lock.ErrUnknown and ErrForbidden.
func (c *Control) Lock(ctx context.Context, by auth.Principal, id lock.ID, a access.Action) (lock.State, error) {
	state, err := c.load(ctx, id)
	if err != nil {
		return state, err
	}
	_, err = Authorize(by.Subject, a, state)
	return state, err
}

// load reads a lock as it is now; one that does not exist has version 0.
func (c *Control) load(ctx context.Context, id lock.ID) (state lock.State, err error) {
	b, err := c.db.Lock(ctx, int64(id))
	if errors.Is(err, store.ErrNotFound) {
		return lock.State{ID: id}, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &state)
	}
	if err != nil {
		return state, fmt.Errorf("load lock %s: %w", id, err)
	}
	return state, nil
}

// Stream is where a lock's events are.
func Stream(id lock.ID) event.Stream { return event.Stream("lock/" + id.String()) }

func (c *Control) meta(r Request, right access.Right) event.Meta {
	return event.Meta{
		Actor: r.By.Actor, Org: r.By.Org, Credential: r.By.Credential, Right: string(right),
		Remote: r.Remote, Agent: r.Agent,
	}
}

func (r Request) standing(now time.Time) store.Standing {
	s := r.By.Standing
	s.Now = now
	return s
}

// again decides anew while another node gets in between.
func again(try func() (Answer, error)) (a Answer, err error) {
	for range retries {
		a, err = try()
		if !errors.Is(err, event.ErrConflict) && !errors.Is(err, store.ErrRepeat) {
			break
		}
	}
	if errors.Is(err, store.ErrRevoked) {
		err = fmt.Errorf("%w: %w", auth.ErrUnauthenticated, err)
	}
	return a, err
}
