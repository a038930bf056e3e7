package control

import (
	"context"

	"github.com/openlock/openlock/internal/access"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/lock"
)

// Since is the first version of a lock that somebody may read: an organisation
// or an owner sees nothing that was recorded for those before them.
func Since(by auth.Principal, s lock.State) int64 {
	switch {
	case by.Super:
		return 1
	case by.Org != "":
		return s.OrgSince
	default:
		return s.OwnerSince
	}
}

// Events reads at most limit events of a lock from a version on, oldest first.
// What may be read starts at Since.
func (c *Control) Events(ctx context.Context, id lock.ID, from int64, limit int) ([]event.Record, error) {
	return c.db.Stream(ctx, Stream(id), from, limit)
}

// Command reads one command of a lock. Refuses with lock.ErrUnknown,
// ErrForbidden and store.ErrNotFound.
func (c *Control) Command(ctx context.Context, by auth.Principal, id lock.ID, cmd lock.CommandID) (*Command, error) {
	state, err := c.Lock(ctx, by, id, access.Audit)
	if err != nil {
		return nil, err
	}
	row, err := c.db.Command(ctx, int64(id), string(cmd))
	if err != nil {
		return nil, err
	}
	if row.Version < Since(by, state) {
		return nil, ErrForbidden
	}
	return viewRow(row)
}

// Commands reads at most limit commands of a lock, newest first, those before
// one when that is not empty. Refuses with lock.ErrUnknown and ErrForbidden.
func (c *Control) Commands(ctx context.Context, by auth.Principal, id lock.ID, before lock.CommandID, limit int) ([]*Command, error) {
	state, err := c.Lock(ctx, by, id, access.Audit)
	if err != nil {
		return nil, err
	}
	rows, err := c.db.Commands(ctx, int64(id), Since(by, state), string(before), limit)
	if err != nil {
		return nil, err
	}
	all := make([]*Command, len(rows))
	for i, row := range rows {
		if all[i], err = viewRow(row); err != nil {
			return nil, err
		}
	}
	return all, nil
}
