package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// problem is an error as it stands on the wire: the one body of every error of
// every JSON endpoint.
type problem struct {
	Success bool     `json:"success"` // always false
	Name    string   `json:"error"`   // short, stable name
	Message string   `json:"message"` // what to do
	Code    int      `json:"code"`    // the HTTP status
	Errors  []detail `json:"errors"`

	// Of a 502 of OpenLock: "not_sent", and what was recorded.
	Reason  string       `json:"reason,omitempty"`
	Command *commandBody `json:"command,omitempty"`

	// RFC 6749 section 5.2, of the token endpoint.
	Description string `json:"error_description,omitempty"`

	retryAfter string
	cause      error // for the log
}

type detail struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

func (p *problem) Error() string { return p.Name + ": " + p.Message }

// wording of the reference page; messages start with it.
var wording = map[int]string{
	http.StatusUnauthorized: "Authentication required. Please provide a valid API token",
	http.StatusForbidden:    "You don't have permission to access this resource",
	http.StatusNotFound:     "The requested resource was not found",
	http.StatusBadGateway:   "Failed to update device shadow",
}

// fail makes a problem. The reference page names a 502 just "Error".
func fail(status int, format string, args ...any) *problem {
	p := &problem{Name: http.StatusText(status), Code: status, Message: fmt.Sprintf(format, args...)}
	if status == http.StatusBadGateway {
		p.Name = "Error"
	}
	if w := wording[status]; w != "" && p.Message != "" {
		p.Message = w + ": " + p.Message
	} else if w != "" {
		p.Message = w
	}
	return p
}

// problemOf turns any error of a handler into what the caller is told. What it
// does not know is the server's own fault and told to the log alone.
func problemOf(err error) (p *problem, ours bool) {
	switch {
	case errors.As(err, &p):
		return p, false
	case errors.Is(err, auth.ErrUnauthenticated):
		return fail(http.StatusUnauthorized, "%v", err), false
	case errors.Is(err, control.ErrForbidden):
		return fail(http.StatusForbidden, ""), false
	case errors.Is(err, lock.ErrUnknown):
		return fail(http.StatusNotFound, "there is no lock with this id"), false
	case errors.Is(err, lock.ErrUnknownKey), errors.Is(err, store.ErrNotFound):
		return fail(http.StatusNotFound, "%v", unprefixed(err)), false
	case errors.Is(err, lock.ErrKeyTaken), errors.Is(err, store.ErrUUIDTaken), errors.Is(err, store.ErrExists):
		return fail(http.StatusConflict, "%v", unprefixed(err)), false
	case errors.Is(err, control.ErrMismatch):
		return fail(http.StatusUnprocessableEntity, "%v; use a new one for a new request", err), false
	case errors.Is(err, auth.ErrInput):
		return fail(http.StatusBadRequest, "%v", err), false
	case errors.Is(err, store.ErrNoOrganization):
		return fail(http.StatusNotFound, "there is no organization with this id"), false
	case errors.Is(err, control.ErrTooMany):
		p := fail(http.StatusTooManyRequests, "this lock has too many commands under way; try again in a second")
		p.retryAfter = "1"
		return p, false
	case errors.Is(err, context.Canceled):
		return fail(http.StatusServiceUnavailable, "the request was cancelled"), false
	case errors.Is(err, store.ErrUnusable), errors.Is(err, store.ErrClosed):
		return fail(http.StatusServiceUnavailable, "the server cannot record anything right now; try again soon"), true
	}
	return fail(http.StatusInternalServerError, "the server failed; its log says why"), true
}

func unprefixed(err error) error {
	for _, known := range []error{lock.ErrUnknownKey, lock.ErrKeyTaken} {
		if errors.Is(err, known) {
			return known
		}
	}
	switch {
	case errors.Is(err, store.ErrUUIDTaken):
		return errors.New("another lock has this uuid")
	case errors.Is(err, store.ErrExists):
		return errors.New("it already exists")
	}
	return errors.New("it does not exist")
}

// refuse is the one place that answers with an error.
func (s *Server) refuse(c *call, err error) {
	p, ours := problemOf(err)
	if ours {
		p.cause = err
	}
	if p.cause != nil {
		s.log.Error("request failed", "route", c.r.Pattern, "error", p.cause)
	}
	p.Errors = []detail{{Code: p.Code, Message: p.Message}}
	if p.Code == http.StatusUnauthorized && c.w.Header().Get("WWW-Authenticate") == "" {
		c.w.Header().Set("WWW-Authenticate", `Bearer realm="openlock"`)
	}
	if p.retryAfter != "" {
		c.w.Header().Set("Retry-After", p.retryAfter)
	}
	c.json(p.Code, p)
}
