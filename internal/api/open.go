package api

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/lock"
)

// Limits of OpenLock's body.
const (
	requestIDMost = 255  // bytes
	reasonMost    = 1000 // characters
)

// answerBody is the answer of every command.
type answerBody struct {
	Success     bool         `json:"success"`
	AggregateID string       `json:"aggregateId"`
	Version     int64        `json:"version"`
	Event       *eventBody   `json:"event"`
	Command     *commandBody `json:"command,omitempty"`
}

type eventBody struct {
	Type string `json:"type"`
	Data any    `json:"data"`
}

// commandBody shows a command and what became of it.
type commandBody struct {
	ID          lock.CommandID `json:"id"`
	LockID      lock.ID        `json:"lockId"`
	Outcome     lock.Result    `json:"outcome"`
	Reason      string         `json:"reason,omitempty"`
	ConfirmedBy string         `json:"confirmedBy"`
	Delivered   lock.Delivered `json:"delivered,omitempty"`
	IssuedAt    string         `json:"issuedAt"`
	ExpiresAt   string         `json:"expiresAt"`
}

func (s *Server) openLock(c *call) error {
	var in struct {
		RequestID opt[string] `json:"requestId"`
		Reason    opt[string] `json:"reason"`
		Expiry    opt[int64]  `json:"expiresInSeconds"` // beyond the contract
	}
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := first(text("requestId", in.RequestID, 0, requestIDMost), characters("reason", in.Reason, reasonMost)); err != nil {
		return err
	}
	const least, most = int64(auth.OpenExpiryLeast / time.Second), int64(auth.OpenExpiryMost / time.Second)
	if in.Expiry.Set && (in.Expiry.V < least || in.Expiry.V > most) {
		return fail(http.StatusBadRequest, "expiresInSeconds must be from %d to %d", least, most)
	}
	expiry := time.Duration(in.Expiry.V) * time.Second
	r, err := c.request()
	if err != nil {
		return err
	}
	a, err := s.control.Open(c.r.Context(), r, control.OpenRequest{RequestID: in.RequestID.V, Reason: in.Reason.V, Expiry: expiry})
	if err != nil {
		return notOpened(a, err)
	}
	if n, asked := waitOf(c.r.Header); asked {
		c.w.Header().Set("Preference-Applied", "wait="+strconv.Itoa(n))
		a.Command = s.await(c.r.Context(), a.Command, time.Duration(n)*time.Second)
	}
	s.answer(c, a)
	return nil
}

// notOpened is 502 when the device was not commanded.
func notOpened(a control.Answer, err error) error {
	if !errors.Is(err, control.ErrNotSent) {
		return err
	}
	p := fail(http.StatusBadGateway, "%s", tellUnsent(a))
	p.Reason, p.Command = "not_sent", showCommand(a.Command)
	if a.Command == nil {
		p.cause = err
	}
	return p
}

func tellUnsent(a control.Answer) string {
	if a.Command == nil {
		return "the command could not be recorded, so it was not sent; the door stays as it is and a retry is safe"
	}
	switch a.Command.Outcome.Reason {
	case "offline":
		return "the lock is offline; the command was not sent and will not be sent later"
	case "too_late":
		return "the command expired before it could be sent; it will not be sent later"
	}
	return "the command was not sent and will not be sent later"
}

// await waits for the outcome. It ends early when the caller goes away or the
// server is to stop.
func (s *Server) await(ctx context.Context, cmd *control.Command, atMost time.Duration) *control.Command {
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	defer context.AfterFunc(s.closing, cancel)()
	return s.control.Await(ctx, cmd)
}

// waitMost is the longest wait that is granted, in seconds.
const waitMost = 30

// waitOf finds wait=N among the preferences (RFC 7240 section 4.3). What cannot
// be understood is ignored, as section 2 wants.
func waitOf(h http.Header) (seconds int, asked bool) {
	for _, line := range h.Values("Prefer") {
		for p := range strings.SplitSeq(line, ",") {
			p, _, _ = strings.Cut(p, ";")
			name, value, _ := strings.Cut(p, "=")
			n, err := strconv.ParseUint(strings.Trim(strings.TrimSpace(value), `"`), 10, 31)
			if strings.EqualFold(strings.TrimSpace(name), "wait") && err == nil {
				return min(int(n), waitMost), true
			}
		}
	}
	return 0, false
}

// answer writes a command's answer.
func (s *Server) answer(c *call, a control.Answer) {
	if a.Replayed {
		c.w.Header().Set("Idempotent-Replayed", "true")
	}
	c.json(a.Status, answerBody{
		Success: true, AggregateID: a.Lock.String(), Version: a.Version,
		Event: showEvent(a.Event), Command: showCommand(a.Command),
	})
}

func showEvent(r *event.Record) *eventBody {
	if r == nil {
		return nil
	}
	return &eventBody{Type: r.Type, Data: r.Data}
}

func showCommand(cmd *control.Command) *commandBody {
	if cmd == nil {
		return nil
	}
	return &commandBody{
		ID: cmd.ID, LockID: cmd.Lock, Outcome: cmd.Outcome.Result, Reason: cmd.Outcome.Reason,
		ConfirmedBy: cmd.Outcome.ConfirmedBy, Delivered: cmd.Outcome.Delivered,
		IssuedAt: wireTime(cmd.IssuedAt), ExpiresAt: wireTime(cmd.ExpiresAt),
	}
}

func (s *Server) command(c *call) error {
	cmd, err := s.control.Command(c.r.Context(), c.by, c.id, lock.CommandID(c.r.PathValue("command")))
	if err != nil {
		return err
	}
	c.json(http.StatusOK, showCommand(cmd))
	return nil
}

// commandsPage is how many commands one answer lists.
const commandsPage = 50

// commands lists a lock's commands, newest first; ?before=<id> goes on.
func (s *Server) commands(c *call) error {
	all, err := s.control.Commands(c.r.Context(), c.by, c.id, lock.CommandID(c.r.URL.Query().Get("before")), commandsPage)
	if err != nil {
		return err
	}
	body := struct {
		Commands []*commandBody `json:"commands"`
		Next     lock.CommandID `json:"next,omitempty"` // pass as ?before=
	}{Commands: []*commandBody{}}
	for _, cmd := range all {
		body.Commands = append(body.Commands, showCommand(cmd))
	}
	if len(all) == commandsPage {
		body.Next = all[len(all)-1].ID
	}
	c.json(http.StatusOK, body)
	return nil
}
