package main

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/device"
	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// history is what the log says of one lock's commands.
type history struct {
	requested map[string]event.Record // by command id
	ended     map[string]event.Record
	late      map[string]event.Record
	version   int64
}

// audit reads a lock's whole log and fails the test when it breaks a promise:
// versions without gaps, one request and exactly one outcome a command, and the
// state beside the log equal to its fold.
func audit(t testing.TB, db *store.DB, id lock.ID) history {
	t.Helper()
	h := history{requested: map[string]event.Record{}, ended: map[string]event.Record{}, late: map[string]event.Record{}}
	records := everything(t, db, id)
	for i, r := range records {
		if r.Version != int64(i)+1 {
			t.Fatalf("lock %s: version %d at place %d", id, r.Version, i+1)
		}
		command := r.Meta.Command
		switch r.Type {
		case "LockOpenRequested":
			if _, twice := h.requested[command]; twice || command == "" {
				t.Errorf("lock %s: command %q was requested twice, or has no id", id, command)
			}
			h.requested[command] = r
		case "LockOpened", "LockOpenRefused", "LockOpenFailed", "LockOpenExpired":
			if _, asked := h.requested[command]; !asked {
				t.Errorf("lock %s: %s of command %q, which nobody requested", id, r.Type, command)
			}
			if first, twice := h.ended[command]; twice {
				t.Errorf("lock %s: command %q ended as %s and as %s", id, command, first.Type, r.Type)
			}
			h.ended[command] = r
		case "OpenReportedLate":
			h.late[command] = r
		}
	}
	h.version = int64(len(records))
	for command := range h.requested {
		if _, ok := h.ended[command]; !ok {
			t.Errorf("lock %s: command %q has no outcome", id, command)
		}
	}
	checkState(t, db, id, records)
	return h
}

func everything(t testing.TB, db *store.DB, id lock.ID) (all []event.Record) {
	t.Helper()
	for {
		page, err := db.Stream(context.Background(), control.Stream(id), int64(len(all))+1, 1000)
		if err != nil {
			t.Fatal(err)
		}
		if all = append(all, page...); len(page) < 1000 {
			return all
		}
	}
}

func checkState(t testing.TB, db *store.DB, id lock.ID, records []event.Record) {
	t.Helper()
	kept, err := db.Lock(context.Background(), int64(id))
	if err != nil {
		t.Fatal(err)
	}
	state, err := control.Refold(records)
	if err != nil {
		t.Fatal(err)
	}
	folded, err := json.Marshal(state)
	if err != nil {
		t.Fatal(err)
	}
	if string(kept) != string(folded) {
		t.Errorf("lock %s: kept beside the log:\n%s\nfold of the log:\n%s", id, kept, folded)
	}
}

// checkDoor holds what a door did against the log: every movement has its
// request, none comes twice, none late.
func checkDoor(t testing.TB, h history, opened []device.Event) {
	t.Helper()
	seen := map[string]bool{}
	for _, e := range opened {
		r, asked := h.requested[e.CommandID]
		switch {
		case !asked:
			t.Errorf("the door opened for %s, which is not in the log", e.CommandID)
		case seen[e.CommandID]:
			t.Errorf("the door opened twice for %s", e.CommandID)
		case e.At.After(time.UnixMilli(r.Meta.ExpiresAt).Add(control.DefaultSettings.Skew)):
			t.Errorf("the door opened for %s at %s, after %s", e.CommandID, e.At, time.UnixMilli(r.Meta.ExpiresAt))
		}
		seen[e.CommandID] = true
	}
	for command, r := range h.ended {
		if r.Type == "LockOpened" && !seen[command] {
			t.Errorf("the log says that %s opened the door, which did not move", command)
		}
	}
}
