package control

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// repeats looks up the keys that a call brings. prior is the first call if this
// one repeats it; keys are those that do not name a call yet. Refuses with
// ErrMismatch.
func (c *Control) repeats(ctx context.Context, r Request, open *OpenRequest) (keys []store.Repeat, prior *store.Repeat, err error) {
	for _, k := range r.keys(open) {
		known, err := c.db.Repeat(ctx, k.RepeatKey)
		switch {
		case errors.Is(err, store.ErrNotFound):
		case err != nil:
			return nil, nil, err
		default:
			current, err := c.current(ctx, known, r.Lock, k.ofHeader)
			if err != nil {
				return nil, nil, err
			}
			if current && !bytes.Equal(known.Fingerprint, k.Fingerprint) {
				return nil, nil, fmt.Errorf("%w: %s", ErrMismatch, k.name)
			}
			if current {
				prior = cmp.Or(prior, &known)
				continue
			}
			k.Replaces = known.CreatedAt
		}
		k.CreatedAt = c.clock.Steady()
		if !k.CreatedAt.After(k.Replaces) { // a clock that was set back between two runs of the server
			k.CreatedAt = k.Replaces.Add(time.Millisecond)
		}
		keys = append(keys, k.Repeat)
	}
	return keys, prior, nil
}

// callKey is one of the keys that a call may bring.
type callKey struct {
	store.Repeat
	name     string // of the field or header
	ofHeader bool
}

func (r Request) keys(open *OpenRequest) (keys []callKey) {
	add := func(name, key string, fingerprint []byte) {
		keys = append(keys, callKey{
			Repeat:   store.Repeat{RepeatKey: store.RepeatKey{Caller: r.By.Caller(), Key: key}, Fingerprint: fingerprint},
			name:     name,
			ofHeader: name == "Idempotency-Key",
		})
	}
	if r.IdempotencyKey != "" {
		add("Idempotency-Key", "header:"+r.IdempotencyKey, r.Fingerprint)
	}
	if open != nil && open.RequestID != "" {
		reason := sha256.Sum256([]byte(open.Reason))
		add("requestId", "request:"+r.Lock.String()+":"+open.RequestID, reason[:])
	}
	return keys
}

// current says whether a remembered call is still within its window. The
// windows are measured on the steady clock: setting the clock reopens none.
func (c *Control) current(ctx context.Context, k store.Repeat, id lock.ID, ofHeader bool) (bool, error) {
	if ofHeader {
		return c.clock.Steady().Sub(k.CreatedAt) < headerWindow, nil
	}
	cmd, err := c.db.Command(ctx, int64(id), k.Command)
	if err != nil {
		return false, fmt.Errorf("command %s of a remembered requestId: %w", k.Command, err)
	}
	return cmd.EndedAt.IsZero() || c.clock.Steady().Sub(cmd.EndedAt) < c.settings.Window, nil
}

// remember fills in what the call has led to.
func remember(keys []store.Repeat, f folded, status int, command string) []store.Repeat {
	for i := range keys {
		keys[i].Stream, keys[i].Status, keys[i].Command = Stream(f.after.ID), status, command
		keys[i].Version, keys[i].Event = f.after.Version, len(f.events) > 0
	}
	return keys
}

// replay answers a repetition as the first call was answered, with its
// command's present outcome. Keys that came with it for the first time name
// that call from now on.
func (c *Control) replay(ctx context.Context, r Request, keys []store.Repeat, k store.Repeat) (Answer, error) {
	for i := range keys {
		keys[i].Stream, keys[i].Status, keys[i].Command = k.Stream, k.Status, k.Command
		keys[i].Version, keys[i].Event = k.Version, k.Event
	}
	if len(keys) > 0 {
		if _, err := c.db.Commit(ctx, store.Change{Requires: r.standing(c.clock.Wall()), Remember: keys}); err != nil {
			return Answer{}, err
		}
	}
	id, err := lock.ParseID(string(k.Stream[len("lock/"):]))
	if err != nil {
		return Answer{}, err
	}
	a := Answer{Status: k.Status, Lock: id, Version: k.Version, Replayed: true}
	if k.Event {
		records, err := c.db.Stream(ctx, k.Stream, k.Version, 1)
		if err != nil || len(records) == 0 {
			return a, errors.Join(fmt.Errorf("event %d of %s is missing", k.Version, k.Stream), err)
		}
		a.Event = &records[0]
	}
	if k.Command != "" {
		cmd, err := c.command(ctx, id, lock.CommandID(k.Command))
		if err != nil {
			return a, err
		}
		a.Command = cmd
		if cmd.flight != nil && cmd.flight.lost.Load() != nil {
			return a, fmt.Errorf("%w: %s", ErrNotSent, cmd.Outcome.Reason)
		}
	}
	return a, nil
}

// repeatKeys are the names of remembered calls.
func repeatKeys(keys []store.Repeat) (names []store.RepeatKey) {
	for _, k := range keys {
		names = append(names, k.RepeatKey)
	}
	return names
}
