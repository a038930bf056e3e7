package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/openlock/openlock/internal/api"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/broker"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/shadow"
	"github.com/openlock/openlock/internal/store"
)

// config is what a server is started with.
type config struct {
	data            string // folder
	http, mqtt      string // addresses
	tlsCert, tlsKey string // files; plain HTTP without
	publicURL       string // of the built-in issuer; remembered when empty
	issuers         []auth.IssuerConfig
	settings        control.Settings
	log             *slog.Logger
	drain           time.Duration // that requests under way may take at the end
}

// server is a running openlock.
type server struct {
	*folder
	config  config
	broker  *broker.Broker
	control *control.Control
	issuers *auth.Issuers
	http    net.Listener
	mqtt    net.Listener
	web     *http.Server
	silent  silent
	closing context.CancelFunc // answers waiting requests
	unlock  func()
	work    sync.WaitGroup
}

// folder is a data folder: what the server and the operator's tools share.
type folder struct {
	path     string
	db       *store.DB
	clock    clock.Clock
	registry *auth.Registry
}

// openFolder opens a data folder, making it at first use.
func openFolder(ctx context.Context, path string) (*folder, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("make the data folder: %w; choose another with --data", err)
	}
	if err := writable(path); err != nil {
		return nil, fmt.Errorf("the data folder %s cannot be written to (%w): choose another with --data, or give this user the right and the room to write there", path, unwrapPath(err))
	}
	db, err := store.Open(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("open the data folder: %w", err)
	}
	c, err := openClock(ctx, db)
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return &folder{path: path, db: db, clock: c, registry: auth.NewRegistry(db, c)}, nil
}

// clockSetting is where steady time is anchored from run to run.
const clockSetting = "clock"

func openClock(ctx context.Context, db *store.DB) (clock.Clock, error) {
	var last clock.Anchor
	known, err := db.Setting(ctx, clockSetting)
	if err == nil {
		err = json.Unmarshal([]byte(known), &last)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return clock.Clock{}, fmt.Errorf("read the clock's anchor: %w", err)
	}
	c, next := clock.System(last)
	if next == last {
		return c, nil
	}
	b, err := json.Marshal(next)
	if err == nil {
		err = db.SetSetting(ctx, clockSetting, string(b))
	}
	return c, err
}

// writable tries it out, with some bytes: a full disk still takes empty files.
func writable(folder string) error {
	probe, err := os.CreateTemp(folder, ".writable-*")
	if err != nil {
		return err
	}
	_, err = probe.Write(make([]byte, 4096))
	return errors.Join(err, probe.Close(), os.Remove(probe.Name()))
}

func unwrapPath(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

func (f *folder) ca() (*broker.CA, error) { return broker.OpenCA(filepath.Join(f.path, "pki")) }

// enroll gives a lock's device an identity, in a folder.
func (f *folder) enroll(ctx context.Context, id lock.ID, dir string) error {
	ca, err := f.ca()
	if err != nil {
		return err
	}
	serial, err := ca.Enroll(id.Thing(), dir)
	if err != nil {
		return err
	}
	return f.db.AddCertificate(ctx, id.Thing(), serial, f.clock.Wall())
}

// issuerSetting is where the built-in issuer's URL is remembered, so that
// tokens stay valid when the server moves to another port.
const issuerSetting = "issuer"

// builtin opens the built-in issuer under its URL: the one given, else the one
// remembered, else the fallback.
func (f *folder) builtin(ctx context.Context, given, fallback string) (*auth.BuiltIn, error) {
	known, err := f.db.Setting(ctx, issuerSetting)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	u := given
	if u == "" {
		u = known
	}
	if u == "" {
		u = fallback
	}
	b, err := auth.OpenBuiltIn(filepath.Join(f.path, "token-key.pem"), u)
	if err == nil && u != known {
		err = f.db.SetSetting(ctx, issuerSetting, u)
	}
	return b, err
}

// start brings a server up: it closes what an earlier run left unfinished
// before any listener opens.
func start(ctx context.Context, cfg config) (s *server, err error) {
	s = &server{config: cfg}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.release())
			s = nil
		}
	}()
	if s.folder, err = openFolder(ctx, cfg.data); err != nil {
		return s, err
	}
	s.unlock, err = store.LockFolder(cfg.data)
	if errors.Is(err, store.ErrLocked) {
		err = fmt.Errorf("%w; stop it, or choose another folder with --data", err)
	}
	if err != nil {
		return s, err
	}
	ca, err := s.ca()
	if err != nil {
		return s, err
	}
	cert, err := ca.Server(hostNames(cfg.publicURL)...)
	if err != nil {
		return s, err
	}
	s.broker = broker.New(cert, ca, s.db.RevokedCertificates, s.clock, cfg.log)
	s.control = control.New(s.db, s.clock, cfg.log, cfg.settings, func() string { return uuid.Must(uuid.NewV7()).String() })
	shadows := shadow.NewService(s.db, s.broker, s.clock, cfg.log, s.control.Report)
	s.control.Use(shadows)
	ended, err := s.control.Recover(ctx)
	if err != nil {
		return s, err
	}
	if ended > 0 {
		cfg.log.Warn("commands that were under way when the server stopped were closed; none is sent again", "commands", ended)
	}
	if err := s.listen(ctx); err != nil {
		return s, err
	}
	return s, s.serve(ctx, shadows)
}

// hostNames are the names that the broker's certificate is made for, beside
// localhost.
func hostNames(publicURL string) (names []string) {
	if h, err := os.Hostname(); err == nil {
		names = append(names, h)
	}
	if u, err := url.Parse(publicURL); err == nil && u.Hostname() != "" {
		names = append(names, u.Hostname())
	}
	return names
}

func (s *server) listen(ctx context.Context) (err error) {
	if s.http, err = listen(ctx, s.config.http, "--http"); err != nil {
		return err
	}
	if s.config.tlsCert != "" {
		pair, err := tls.LoadX509KeyPair(s.config.tlsCert, s.config.tlsKey)
		if err != nil {
			return fmt.Errorf("read --tls-cert and --tls-key: %w", err)
		}
		s.http = tls.NewListener(s.http, &tls.Config{
			Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
		})
	}
	s.mqtt, err = listen(ctx, s.config.mqtt, "--mqtt")
	return err
}

func listen(ctx context.Context, address, flag string) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%s is in use: stop what listens there, or choose another address with %s", address, flag)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("%s may not be listened on by this user: choose a port above 1023 with %s", address, flag)
	case err != nil:
		return nil, fmt.Errorf("listen on %s (%s): %w", address, flag, err)
	}
	return l, nil
}

// url is where the server is reached.
func (s *server) url() string {
	scheme := "http"
	if s.config.tlsCert != "" {
		scheme = "https"
	}
	return scheme + "://" + s.http.Addr().String()
}

func (s *server) serve(ctx context.Context, shadows *shadow.Service) error {
	builtin, err := s.builtin(ctx, s.config.publicURL, s.url())
	if err != nil {
		return err
	}
	s.issuers = auth.NewIssuers(builtin, s.config.issuers, &http.Client{}, s.config.log)
	who := auth.NewAuthenticator(s.db, s.issuers, builtin, s.clock)
	life, closing := context.WithCancel(context.Background())
	s.closing = closing
	handler, err := api.New(api.Config{
		Control: s.control, Who: who, BuiltIn: builtin, Registry: s.registry, DB: s.db,
		Clock: s.clock, Log: s.config.log, Version: version, Closing: life,
	})
	if err != nil {
		return err
	}
	s.broker.Serve(s.mqtt.(*net.TCPListener), shadows.Handle)
	s.web = &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		WriteTimeout:      45 * time.Second, // longer than the longest wait for an outcome
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          slog.NewLogLogger(s.config.log.Handler(), slog.LevelWarn),
		ConnState:         s.silent.note,
	}
	s.web.RegisterOnShutdown(s.silent.hangUp)
	s.work.Go(func() {
		if err := s.web.Serve(s.http); !errors.Is(err, http.ErrServerClosed) {
			s.config.log.Error("HTTP stopped", "error", err)
		}
	})
	s.work.Go(func() { s.control.Run(life) })
	s.work.Go(func() { s.keepHouse(life, who) })
	return nil
}

// silent are the connections on which nothing was said yet. net/http would wait
// 5 s for them before it shuts down; browsers and pools keep some in reserve.
type silent struct {
	mu    sync.Mutex
	conns map[net.Conn]bool
}

func (s *silent) note(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns == nil {
		s.conns = map[net.Conn]bool{}
	}
	if state == http.StateNew {
		s.conns[c] = true
	} else {
		delete(s.conns, c)
	}
}

func (s *silent) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.Close()
	}
}

// houseEvery is how often what can wait is written down.
const houseEvery = 30 * time.Second

// keepHouse notes when credentials were used and forgets old repetitions.
func (s *server) keepHouse(life context.Context, who *auth.Authenticator) {
	tick := time.NewTicker(houseEvery)
	defer tick.Stop()
	for done := false; !done; {
		select {
		case <-tick.C:
		case <-life.Done():
			done = true
		}
		err := errors.Join(who.Flush(context.Background()), s.control.ForgetRepeats(context.Background()))
		if err != nil {
			s.config.log.Error("housekeeping failed; it is tried again", "error", err)
		}
	}
}

// wait returns when ctx is done or the server can no longer record.
func (s *server) wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-s.db.Broken():
		return s.db.Err()
	}
}

// close drains: no new requests, those under way are answered (waiting ones at
// once), then devices are disconnected and the database closed.
func (s *server) close() error {
	s.closing()
	ctx, cancel := context.WithTimeout(context.Background(), s.config.drain)
	defer cancel()
	err := s.web.Shutdown(ctx)
	if err != nil {
		err = errors.Join(fmt.Errorf("requests were still under way after %s: %w", s.config.drain, err), s.web.Close())
	}
	s.broker.Close()
	s.work.Wait()
	return errors.Join(err, s.release())
}

// release gives back what start has taken.
func (s *server) release() error {
	var err error
	if s.issuers != nil {
		s.issuers.Close()
	}
	for _, l := range []net.Listener{s.http, s.mqtt} {
		if l != nil {
			_ = l.Close() // closed already when it was served
		}
	}
	if s.folder != nil {
		err = s.db.Close()
	}
	if s.unlock != nil {
		s.unlock()
	}
	return err
}
