package control

import (
	"cmp"
	"context"
	"slices"
)

// Sweep ends everything whose time is over, oldest first, before it returns.
// It is sweep on the caller's goroutine, so that a simulation can replay it, and
// die in the middle of it.
func (c *Control) Sweep(ctx context.Context) error {
	due := c.due()
	slices.SortFunc(due, func(a, b *flight) int { return cmp.Compare(a.id, b.id) })
	for _, f := range due {
		if err := c.finishLocked(ctx, f); err != nil {
			return err
		}
	}
	return nil
}
