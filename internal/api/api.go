// Package api is the HTTP API: routes, input, answers. It decides nothing about
// locks. Handlers return errors; refuse is the one place that writes them.
package api

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/contract"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// Server answers HTTP requests.
type Server struct {
	control  *control.Control
	who      *auth.Authenticator
	builtin  *auth.BuiltIn
	registry *auth.Registry
	db       *store.DB
	clock    clock.Clock
	log      *slog.Logger
	version  string
	closing  context.Context // done when waiting requests should be answered
	reads    chan struct{}   // slots of GET requests at work
	mux      *http.ServeMux
}

// Under overload reads give way to opens: so many are at work at a time, fewer
// than the database has readers, and the others wait, but not for long.
const (
	readsAtWork = 3
	readWithin  = 2 * time.Second
)

// Config is what a Server works with.
type Config struct {
	Control  *control.Control
	Who      *auth.Authenticator
	BuiltIn  *auth.BuiltIn
	Registry *auth.Registry
	DB       *store.DB
	Clock    clock.Clock
	Log      *slog.Logger
	Version  string
	Closing  context.Context
}

// New makes the handler of all routes. Routes of the contract that this version
// does not serve answer 501.
func New(c Config) (*Server, error) {
	s := &Server{
		control: c.Control, who: c.Who, builtin: c.BuiltIn, registry: c.Registry, db: c.DB,
		clock: c.Clock, log: c.Log, version: c.Version, closing: c.Closing,
		reads: make(chan struct{}, readsAtWork), mux: http.NewServeMux(),
	}
	served := map[string]bool{}
	for _, r := range s.routes() {
		served[r.pattern()] = true
		s.mux.Handle(r.pattern(), s.handler(r))
	}
	return s, s.announceUnserved(served)
}

// announceUnserved tells callers of the contract's other routes the truth.
func (s *Server) announceUnserved(served map[string]bool) error {
	var doc struct {
		Paths map[string]map[string]json.RawMessage `json:"paths"`
	}
	if err := json.Unmarshal(contract.OpenAPI, &doc); err != nil {
		return fmt.Errorf("read the contract: %w", err)
	}
	for p, methods := range doc.Paths {
		for m := range methods {
			r := route{method: strings.ToUpper(m), path: p, who: anybody, do: (*Server).unserved}
			if !served[r.pattern()] {
				s.mux.Handle(r.pattern(), s.handler(r))
			}
		}
	}
	return nil
}

func (s *Server) unserved(*call) error {
	return fail(http.StatusNotImplemented, "this version of openlock does not serve this route of the contract yet")
}

// call is one request on its way.
type call struct {
	w           http.ResponseWriter
	r           *http.Request
	by          auth.Principal
	id          lock.ID // of routes under /locks/{id}
	received    clock.Deadline
	status      int
	fingerprint []byte // of method, path and body, once the body was read
	done        func() // the work is done, and what is left is to tell the caller
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{w: w, r: r}
	if p := r.URL.EscapedPath(); strings.Contains(p, "%") || path.Clean(p) != strings.TrimSuffix(p, "/") && p != "/" {
		s.refuse(c, fail(http.StatusBadRequest, "write the path plainly: no percent-encoding, no empty and no dot segments"))
		return
	}
	if _, pattern := s.mux.Handler(r); pattern == "" {
		s.refuse(c, s.noRoute(c))
		return
	}
	s.mux.ServeHTTP(w, r)
}

// noRoute tells an unknown path from a method that is not allowed.
func (s *Server) noRoute(c *call) error {
	var allowed []string
	for _, m := range []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodDelete} {
		other := c.r.Clone(c.r.Context())
		other.Method = m
		if _, pattern := s.mux.Handler(other); pattern != "" {
			allowed = append(allowed, m)
		}
	}
	if len(allowed) == 0 {
		return fail(http.StatusNotFound, "there is no such path")
	}
	c.w.Header().Set("Allow", strings.Join(allowed, ", "))
	return fail(http.StatusMethodNotAllowed, "use %s on this path", strings.Join(allowed, " or "))
}

// handler wraps a route: who is calling, which lock, one log line, one answer
// to whatever goes wrong.
func (s *Server) handler(r route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		c := &call{w: w, r: req, received: s.clock.In(0)}
		defer s.logged(c, r)
		if err := s.enter(c, r); err != nil {
			s.refuse(c, err)
			return
		}
		if err := s.admit(c, r); err != nil {
			s.refuse(c, err)
			return
		}
		if err := r.do(s, c); err != nil {
			s.refuse(c, err)
		}
	})
}

// enter gives a GET its turn. Commands need none: they have room of their own.
func (s *Server) enter(c *call, r route) error {
	if r.method != http.MethodGet {
		return nil
	}
	tooLong := time.NewTimer(readWithin)
	defer tooLong.Stop()
	select {
	case s.reads <- struct{}{}:
		c.done = sync.OnceFunc(func() { <-s.reads })
		return nil
	case <-tooLong.C:
	case <-c.r.Context().Done():
	}
	p := fail(http.StatusServiceUnavailable, "the server is busy; try again in a second")
	p.retryAfter = "1"
	return p
}

// logged writes the request's line: its route rather than its path, which may
// hold a secret of somebody's, and never its query.
func (s *Server) logged(c *call, r route) {
	if p := recover(); p != nil {
		s.log.Error("request panicked", "route", r.pattern(), "panic", p, "stack", string(debug.Stack()))
		if c.status == 0 {
			s.refuse(c, fail(http.StatusInternalServerError, "the server failed; its log says why"))
		}
	}
	s.log.Info("request", "route", r.pattern(), "lock", int64(c.id), "status", c.status,
		"ms", float64(s.clock.Steady().Sub(c.received.Steady).Microseconds())/1000, "actor", c.by.Actor, "remote", c.remote())
}

// admit finds out who is calling and what about, as far as the route wants to
// know.
func (s *Server) admit(c *call, r route) (err error) {
	for _, name := range []string{"X-Org-Id", "X-User-Id"} {
		if len(c.r.Header.Values(name)) > 0 {
			return fail(http.StatusBadRequest, "do not send %s: who you are comes from your credentials alone", name)
		}
	}
	if r.who == anybody {
		return nil
	}
	if c.by, err = s.who.Request(c.r); err != nil {
		return err
	}
	if r.who == operator && !c.by.Super {
		return control.ErrForbidden
	}
	if strings.HasPrefix(r.path, "/locks/{id}") {
		if c.id, err = lock.ParseID(c.r.PathValue("id")); err != nil {
			return fail(http.StatusBadRequest, "%v", err)
		}
	}
	return nil
}

// request is what the command path needs to know of a call whose body was read.
func (c *call) request() (control.Request, error) {
	keys := c.r.Header.Values("Idempotency-Key")
	if len(keys) > 1 || len(keys) == 1 && !validKey(keys[0]) {
		return control.Request{}, fail(http.StatusBadRequest, "send one Idempotency-Key of 1 to 255 printable ASCII characters")
	}
	r := control.Request{
		By: c.by, Lock: c.id, Remote: c.remote(), Agent: cut(c.r.UserAgent(), 256),
		Received: c.received, Fingerprint: c.fingerprint,
	}
	if len(keys) == 1 {
		r.IdempotencyKey = keys[0]
	}
	return r, nil
}

func validKey(k string) bool {
	return k != "" && len(k) <= 255 && !strings.ContainsFunc(k, func(r rune) bool { return r < 0x20 || r > 0x7e })
}

func (c *call) remote() string {
	host, _, err := net.SplitHostPort(c.r.RemoteAddr)
	if err != nil {
		return c.r.RemoteAddr
	}
	return host
}

func cut(s string, most int) string {
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "")
	}
	return s
}

// json answers.
func (c *call) json(status int, body any) {
	b, err := json.Marshal(body)
	if err != nil {
		panic(fmt.Sprintf("api: marshal %T: %v", body, err)) // our own types always can be
	}
	c.raw(status, "application/json", b)
}

func (c *call) raw(status int, contentType string, body []byte) {
	h := c.w.Header()
	h.Set("Content-Type", contentType)
	h.Set("X-Content-Type-Options", "nosniff")
	if h.Get("Cache-Control") == "" {
		h.Set("Cache-Control", "no-store")
	}
	c.status = status
	if c.done != nil {
		c.done() // a caller who reads slowly holds up nobody
	}
	c.w.WriteHeader(status)
	_, _ = c.w.Write(body) // who went away does not hear
}

// wireTime is how times stand on the wire.
func wireTime(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }
