package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/shadow"
)

const eventColumns = `position, stream, version, type, schema, org, at, data, meta`

// Stream implements event.Log.
func (db *DB) Stream(ctx context.Context, s event.Stream, from int64, limit int) ([]event.Record, error) {
	return db.records(ctx, `SELECT `+eventColumns+` FROM events WHERE stream = ? AND version >= ? ORDER BY version LIMIT ?`, s, from, limit)
}

// After implements event.Log.
func (db *DB) After(ctx context.Context, p event.Position, limit int) ([]event.Record, error) {
	return db.records(ctx, `SELECT `+eventColumns+` FROM events WHERE position > ? ORDER BY position LIMIT ?`, p, limit)
}

// pollEvery bounds how late Wait notices what another process appended.
const pollEvery = time.Second

// Wait implements event.Log.
func (db *DB) Wait(ctx context.Context, p event.Position) error {
	for {
		changed := db.writer.next()
		var last event.Position
		if err := db.row(ctx, `SELECT coalesce(max(position), 0) FROM events`, nil, &last); err != nil {
			return err
		}
		if last > p {
			return nil
		}
		poll := time.NewTimer(pollEvery)
		select {
		case <-changed:
		case <-poll.C:
		case <-db.writer.ended:
			return ErrClosed
		case <-ctx.Done():
			poll.Stop()
			return ctx.Err()
		}
		poll.Stop()
	}
}

func (db *DB) records(ctx context.Context, q string, args ...any) ([]event.Record, error) {
	rows, err := db.query(ctx, q, args...)
	if err != nil {
		return nil, err
	}
	return scan(rows, func(r *event.Record) error {
		var at int64
		var data, meta string
		if err := rows.Scan(&r.Position, &r.Stream, &r.Version, &r.Type, &r.Schema, &r.Org, &at, &data, &meta); err != nil {
			return err
		}
		r.Time, r.Data = time.UnixMilli(at).UTC(), json.RawMessage(data)
		return json.Unmarshal([]byte(meta), &r.Meta)
	})
}

// scan reads all rows and closes them.
func scan[T any](rows *sql.Rows, one func(*T) error) (all []T, err error) {
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var t T
		if err := one(&t); err != nil {
			return nil, err
		}
		all = append(all, t)
	}
	return all, rows.Err()
}

// Lock reads a lock's folded state, JSON. Refuses with ErrNotFound.
func (db *DB) Lock(ctx context.Context, id int64) ([]byte, error) {
	var state string
	err := db.row(ctx, `SELECT state FROM locks WHERE id = ?`, []any{id}, &state)
	return []byte(state), err
}

const commandColumns = `id, lock, version, issued_at, expires_at, coalesce(ended_at, 0), coalesce(outcome, '')`

// Command reads one command of a lock. Refuses with ErrNotFound.
func (db *DB) Command(ctx context.Context, lock int64, id string) (CommandRow, error) {
	all, err := db.commands(ctx, `SELECT `+commandColumns+` FROM commands WHERE id = ? AND lock = ?`, id, lock)
	if err == nil && len(all) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return CommandRow{}, err
	}
	return all[0], nil
}

// Commands reads at most limit commands of a lock whose requests have at least
// the version since, newest first, older than before when that is not empty.
func (db *DB) Commands(ctx context.Context, lock, since int64, before string, limit int) ([]CommandRow, error) {
	if before == "" {
		before = "~" // behind every id
	}
	return db.commands(ctx, `SELECT `+commandColumns+` FROM commands WHERE lock = ? AND id < ? AND version >= ?
		ORDER BY id DESC LIMIT ?`, lock, before, since, limit)
}

// PendingCommands reads every command that has not ended, oldest first.
func (db *DB) PendingCommands(ctx context.Context) ([]CommandRow, error) {
	return db.commands(ctx, `SELECT `+commandColumns+` FROM commands WHERE ended_at IS NULL ORDER BY id`)
}

func (db *DB) commands(ctx context.Context, q string, args ...any) ([]CommandRow, error) {
	rows, err := db.query(ctx, q, args...)
	if err != nil {
		return nil, err
	}
	return scan(rows, func(r *CommandRow) error {
		var issued, expires, ended int64
		var outcome string
		if err := rows.Scan(&r.ID, &r.Lock, &r.Version, &issued, &expires, &ended, &outcome); err != nil {
			return err
		}
		r.IssuedAt, r.ExpiresAt, r.EndedAt = fromMillis(issued), fromMillis(expires), fromMillis(ended)
		if outcome != "" {
			r.Outcome = []byte(outcome)
		}
		return nil
	})
}

// Repeat reads what is remembered of a call. Refuses with ErrNotFound.
func (db *DB) Repeat(ctx context.Context, k RepeatKey) (Repeat, error) {
	r := Repeat{RepeatKey: k}
	var created int64
	err := db.row(ctx, `SELECT fingerprint, stream, version, event, status, command, created_at FROM repeats WHERE caller = ? AND key = ?`,
		[]any{k.Caller, k.Key}, &r.Fingerprint, &r.Stream, &r.Version, &r.Event, &r.Status, &r.Command, &created)
	r.CreatedAt = fromMillis(created)
	return r, err
}

// ForgetRepeats drops what was remembered before a moment of the steady clock.
func (db *DB) ForgetRepeats(ctx context.Context, before time.Time) error {
	return db.writer.do(ctx, true, func(tx *tx) error {
		return tx.exec(`DELETE FROM repeats WHERE created_at < ?`, millis(before))
	})
}

// LoadShadow reads a shadow's durable form. Refuses with ErrNotFound.
func (db *DB) LoadShadow(ctx context.Context, a shadow.Address) ([]byte, error) {
	var doc []byte
	err := db.row(ctx, `SELECT document FROM shadows WHERE thing = ? AND name = ?`, []any{a.Thing, a.Name}, &doc)
	if errors.Is(err, ErrNotFound) {
		return nil, shadow.ErrNoDocument
	}
	return doc, err
}

// Setting reads a value the deployment remembers. Refuses with ErrNotFound.
func (db *DB) Setting(ctx context.Context, name string) (string, error) {
	var v string
	err := db.row(ctx, `SELECT value FROM settings WHERE name = ?`, []any{name}, &v)
	return v, err
}

// SetSetting remembers a value.
func (db *DB) SetSetting(ctx context.Context, name, value string) error {
	err := db.writer.do(ctx, true, func(tx *tx) error {
		return tx.exec(`INSERT OR REPLACE INTO settings (name, value) VALUES (?, ?)`, name, value)
	})
	if err != nil {
		return fmt.Errorf("remember %s: %w", name, err)
	}
	return nil
}
