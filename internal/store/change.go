package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/shadow"
)

var (
	// ErrRevoked says that a credential which carried a change no longer stands.
	ErrRevoked = errors.New("store: the credential was revoked, has expired, or its user is suspended")
	// ErrRepeat says that a requestId or Idempotency-Key is already remembered.
	ErrRepeat = errors.New("store: already asked")
	// ErrUUIDTaken says that another lock has the uuid.
	ErrUUIDTaken = errors.New("store: another lock has this uuid")
)

// Change is what is recorded together, or not at all. It is data, not a
// transaction held open, so that many can travel in one commit.
type Change struct {
	Requires Standing
	Appends  []event.Append // at most one a stream
	Locks    []LockRow
	Commands []CommandRow
	Shadows  []shadow.Row
	Remember []Repeat
	Forget   []RepeatKey
}

// Standing is what must still be true of the caller in the transaction that
// records what they asked for. Empty fields are not asked about.
type Standing struct {
	Credentials []string  // ids of keys and clients: neither revoked nor expired at Now
	User        string    // not suspended
	Token       string    // its jti not revoked
	Expires     time.Time // of the token, leeway included; after Now
	Now         time.Time // wall clock
}

// LockRow is a lock folded to a version.
type LockRow struct {
	ID      int64
	Version int64
	UUID    string
	State   []byte // JSON, lock.State
}

// CommandRow is a command to a device and, once known, how it ended.
type CommandRow struct {
	ID        string
	Lock      int64
	Version   int64     // of the event that asked for it
	IssuedAt  time.Time // wall clock
	ExpiresAt time.Time // wall clock
	EndedAt   time.Time // steady clock; zero while pending
	Outcome   []byte    // JSON, lock.Outcome; nil while pending
}

// RepeatKey names a remembered call.
type RepeatKey struct {
	Caller string // organisation and actor
	Key    string
}

// Repeat is what is remembered of a call, so that a repetition of it is known.
type Repeat struct {
	RepeatKey
	Fingerprint []byte // of what was asked; the same key with another is a mistake
	Stream      event.Stream
	Version     int64 // of the aggregate after the call
	Event       bool  // the event at Version is the call's own
	Status      int   // of the first answer
	Command     string
	CreatedAt   time.Time // steady clock
	Replaces    time.Time // CreatedAt of the outdated one it takes the place of, or zero
}

// Commit records a change and returns its records once they are durable.
// Refuses with event.ErrConflict, ErrRevoked, ErrRepeat or ErrUUIDTaken.
func (db *DB) Commit(ctx context.Context, c Change) ([]event.Record, error) {
	var records []event.Record
	err := db.writer.do(ctx, false, func(tx *tx) error {
		if err := c.check(tx); err != nil {
			return err
		}
		var err error
		records, err = c.write(tx)
		return err
	})
	if err != nil {
		return nil, err
	}
	return records, nil
}

// Append implements event.Log.
func (db *DB) Append(ctx context.Context, a event.Append) ([]event.Record, error) {
	return db.Commit(ctx, Change{Appends: []event.Append{a}})
}

// check refuses before anything is written.
func (c Change) check(tx *tx) error {
	if err := c.Requires.check(tx); err != nil {
		return err
	}
	for _, a := range c.Appends {
		var version int64
		err := tx.row(`SELECT coalesce(max(version), 0) FROM events WHERE stream = ?`, []any{a.Stream}, &version)
		if err != nil {
			return err
		}
		if version != a.Expect {
			return refusal{event.ErrConflict}
		}
	}
	for _, l := range c.Locks {
		var other int64
		err := tx.row(`SELECT id FROM locks WHERE uuid = ? AND id <> ?`, []any{l.UUID, l.ID}, &other)
		if err == nil {
			return refusal{ErrUUIDTaken}
		}
		if !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return c.checkRepeats(tx)
}

func (c Change) checkRepeats(tx *tx) error {
	for _, r := range c.Remember {
		var created int64
		err := tx.row(`SELECT created_at FROM repeats WHERE caller = ? AND key = ?`, []any{r.Caller, r.Key}, &created)
		if err == nil && created != millis(r.Replaces) {
			return refusal{ErrRepeat}
		}
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return nil
}

func (s Standing) check(tx *tx) error {
	for _, id := range s.Credentials {
		var one int
		err := tx.row(`SELECT 1 FROM credentials WHERE id = ? AND revoked_at IS NULL
			AND (expires_at IS NULL OR expires_at > ?)`, []any{id, millis(s.Now)}, &one)
		if errors.Is(err, ErrNotFound) {
			return refusal{ErrRevoked}
		}
		if err != nil {
			return err
		}
	}
	if !s.Expires.IsZero() && !s.Now.Before(s.Expires) {
		return refusal{ErrRevoked}
	}
	if s.User == "" && s.Token == "" {
		return nil
	}
	var bad bool
	err := tx.row(revokedQuery, []any{s.User, s.Token}, &bad)
	if err == nil && bad {
		return refusal{ErrRevoked}
	}
	return err
}

// revokedQuery asks whether a user is suspended or a token's jti revoked.
const revokedQuery = `SELECT EXISTS (SELECT 1 FROM suspended_users WHERE user = ?)
	OR EXISTS (SELECT 1 FROM revoked_tokens WHERE jti = ?)`

func (c Change) write(tx *tx) (records []event.Record, err error) {
	for _, a := range c.Appends {
		for i, e := range a.Events {
			r := event.Record{Stream: a.Stream, Version: a.Expect + int64(i) + 1, Org: a.Org, Time: a.Time.UTC().Truncate(time.Millisecond), New: e}
			if r.Position, err = appendRecord(tx, r); err != nil {
				return nil, err
			}
			records = append(records, r)
		}
	}
	for _, l := range c.Locks {
		if err := tx.exec(`INSERT INTO locks (id, version, uuid, state) VALUES (?, ?, ?, ?)
			ON CONFLICT (id) DO UPDATE SET version = excluded.version, uuid = excluded.uuid, state = excluded.state`,
			l.ID, l.Version, l.UUID, string(l.State)); err != nil {
			return nil, err
		}
	}
	for _, r := range c.Commands {
		if err := writeCommand(tx, r); err != nil {
			return nil, err
		}
	}
	for _, s := range c.Shadows {
		if err := tx.exec(`INSERT INTO shadows (thing, name, document) VALUES (?, ?, ?)
			ON CONFLICT (thing, name) DO UPDATE SET document = excluded.document`, s.Thing, s.Name, s.Document); err != nil {
			return nil, err
		}
	}
	return records, c.writeRepeats(tx)
}

func appendRecord(tx *tx, r event.Record) (event.Position, error) {
	meta, err := json.Marshal(r.Meta)
	if err != nil {
		return 0, fmt.Errorf("store: meta of %s: %w", r.Type, err)
	}
	p, err := tx.insert(`INSERT INTO events (stream, version, type, schema, org, at, data, meta) VALUES (?, ?, ?, ?, ?, ?, ?, ?)`,
		r.Stream, r.Version, r.Type, r.Schema, r.Org, millis(r.Time), string(r.Data), string(meta))
	return event.Position(p), err
}

func writeCommand(tx *tx, r CommandRow) error {
	var ended, outcome any
	if !r.EndedAt.IsZero() {
		ended, outcome = millis(r.EndedAt), string(r.Outcome)
	}
	return tx.exec(`INSERT INTO commands (id, lock, version, issued_at, expires_at, ended_at, outcome) VALUES (?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET ended_at = excluded.ended_at, outcome = excluded.outcome`,
		r.ID, r.Lock, r.Version, millis(r.IssuedAt), millis(r.ExpiresAt), ended, outcome)
}

func (c Change) writeRepeats(tx *tx) error {
	for _, r := range c.Remember {
		if err := tx.exec(`INSERT OR REPLACE INTO repeats
			(caller, key, fingerprint, stream, version, event, status, command, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
			r.Caller, r.Key, r.Fingerprint, r.Stream, r.Version, r.Event, r.Status, r.Command, millis(r.CreatedAt)); err != nil {
			return err
		}
	}
	for _, k := range c.Forget {
		if err := tx.exec(`DELETE FROM repeats WHERE caller = ? AND key = ?`, k.Caller, k.Key); err != nil {
			return err
		}
	}
	return nil
}

// SaveShadows makes shadow documents durable.
func (db *DB) SaveShadows(ctx context.Context, rows ...shadow.Row) error {
	_, err := db.Commit(ctx, Change{Shadows: rows})
	return err
}

// millis is how times are stored; the zero time is 0.
func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}
