package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/contract/contracttest"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/device"
	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// rig is the real program in a test: SQLite in a temporary folder, real HTTP and
// real MQTT over TLS on free ports. Every answer is checked against the contract.
type rig struct {
	*server
	t        testing.TB
	contract *contracttest.Validator
	client   *http.Client
	log      *logBuffer
	issuer   *auth.BuiltIn
}

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

func newRig(t testing.TB, change ...func(*config)) *rig {
	t.Helper()
	r := &rig{t: t, contract: contracttest.New(t), log: &logBuffer{}}
	r.client = &http.Client{
		Transport:     r.contract.Transport(&http.Transport{MaxIdleConnsPerHost: 64}),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       patience * 2,
	}
	cfg := config{
		data: filepath.Join(t.TempDir(), "data"), http: "127.0.0.1:0", mqtt: "127.0.0.1:0",
		settings: control.DefaultSettings, drain: 5 * time.Second,
		log: slog.New(slog.NewTextHandler(r.log, nil)),
	}
	for _, c := range change {
		c(&cfg)
	}
	r.up(cfg)
	t.Cleanup(func() {
		r.down()
		if t.Failed() {
			t.Logf("end of the server's log:\n%s", r.log.tail(8<<10))
		}
	})
	return r
}

func (r *rig) up(cfg config) {
	r.t.Helper()
	s, err := start(r.t.Context(), cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.server = s
	if r.issuer, err = s.builtin(r.t.Context(), "", s.url()); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) down() {
	if r.server == nil {
		return
	}
	if err := r.close(); err != nil {
		r.t.Errorf("close: %v", err)
	}
	r.server = nil
}

// restart stops the server in good order and starts it again on the same
// addresses and data.
func (r *rig) restart() {
	r.t.Helper()
	cfg := r.config
	cfg.http, cfg.mqtt = r.http.Addr().String(), r.mqtt.Addr().String()
	r.down()
	r.up(cfg)
}

// creds are the credentials of a call; empty ones are not sent.
type creds struct{ key, token string }

// org makes an organization and a key with scopes, all by default.
func (r *rig) org(id string, scopes ...string) creds {
	r.t.Helper()
	_, err := r.registry.CreateOrganization(r.t.Context(), id, "")
	if err != nil && !errors.Is(err, store.ErrExists) {
		r.t.Fatal(err)
	}
	return r.key(auth.NewCredential{Kind: store.APIKey, Org: id, Scopes: scopes})
}

func (r *rig) key(n auth.NewCredential) creds {
	r.t.Helper()
	key, _, err := r.registry.Create(r.t.Context(), n)
	if err != nil {
		r.t.Fatal(err)
	}
	return creds{key: key}
}

// super is the operator's key.
func (r *rig) super() creds {
	r.t.Helper()
	return r.key(auth.NewCredential{Kind: store.APIKey, Super: true})
}

// user makes a user and their token.
func (r *rig) user() (id string, c creds) {
	r.t.Helper()
	id = uuid.NewString()
	return id, r.tokenOf(id)
}

func (r *rig) tokenOf(user string) creds {
	r.t.Helper()
	token, _, err := r.issuer.User(user, time.Hour, time.Now())
	if err != nil {
		r.t.Fatal(err)
	}
	return creds{token: token}
}

// reply is an answer, read whole.
type reply struct {
	status int
	header http.Header
	body   map[string]any
	raw    string
}

// get walks into the body: get("event", "type").
func (a reply) get(path ...string) any {
	var v any = a.body
	for _, p := range path {
		m, _ := v.(map[string]any)
		v = m[p]
	}
	return v
}

// send sends a request with any body: nil for none, a string or []byte as it
// is, anything else as JSON.
func (r *rig) send(method, path string, c creds, body any, headers ...string) reply {
	r.t.Helper()
	a, err := r.try(method, path, c, body, headers...)
	if err != nil {
		r.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

func (r *rig) try(method, path string, c creds, body any, headers ...string) (a reply, err error) {
	return sendTo(r.client, r.url(), method, path, c, body, headers...)
}

// sendTo sends a request to any server.
func sendTo(client *http.Client, base, method, path string, c creds, body any, headers ...string) (a reply, err error) {
	var b []byte
	switch body := body.(type) {
	case nil:
	case string:
		b = []byte(body)
	case []byte:
		b = body
	default:
		if b, err = json.Marshal(body); err != nil {
			return a, err
		}
	}
	req, err := http.NewRequest(method, base+path, bytes.NewReader(b))
	if err != nil {
		return a, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.key != "" {
		req.Header.Set("X-API-Key", c.key)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		return a, err
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	a = reply{status: resp.StatusCode, header: resp.Header, raw: string(raw)}
	if err == nil && strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") {
		err = json.Unmarshal(raw, &a.body)
	}
	return a, err
}

// want fails the test when the status is another one.
func (r *rig) want(a reply, status int) reply {
	r.t.Helper()
	if a.status != status {
		r.t.Fatalf("status %d, want %d: %s", a.status, status, a.raw)
	}
	return a
}

// createLock makes a lock for somebody.
func (r *rig) createLock(id lock.ID, c creds) reply {
	r.t.Helper()
	return r.want(r.send("POST", "/locks/"+id.String()+"/CreateLock", c, map[string]any{"index": id, "uuid": "uuid-" + id.String()}), http.StatusCreated)
}

func openPath(id lock.ID) string { return "/locks/" + id.String() + "/OpenLock" }

// door is a simulated lock that is connected.
type door struct {
	t      testing.TB
	config device.Config
	events chan device.Event
	stop   func()
}

// device enrolls a device for a lock (once) and runs it until the test ends or
// stop is called. It returns when the device would receive commands.
func (r *rig) device(id lock.ID, change ...func(*device.Config)) *door {
	r.t.Helper()
	d := r.deviceAway(id, change...)
	d.await(device.Connected)
	return d
}

// deviceAway is device without waiting for the connection.
func (r *rig) deviceAway(id lock.ID, change ...func(*device.Config)) *door {
	r.t.Helper()
	dir := filepath.Join(filepath.Dir(r.path), "devices", id.Thing())
	if err := r.enroll(r.t.Context(), id, dir); err != nil && !strings.Contains(err.Error(), "already holds") {
		r.t.Fatal(err)
	}
	d := &door{t: r.t, config: deviceConfig(id, dir, r.mqtt.Addr().String()), events: make(chan device.Event, 1024)}
	for _, c := range change {
		c(&d.config)
	}
	d.run()
	return d
}

func (d *door) run() {
	d.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	d.config.Observe = func(e device.Event) {
		select {
		case d.events <- e:
		case <-ctx.Done():
		}
	}
	sim, err := device.New(d.config)
	if err != nil {
		cancel()
		d.t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- sim.Run(ctx) }()
	var stopped bool
	d.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			d.t.Errorf("device: %v", err)
		}
	}
	d.t.Cleanup(d.stop)
}

// await returns the next event of a kind.
func (d *door) await(k device.Kind) device.Event {
	d.t.Helper()
	timeout := time.After(patience)
	var seen []device.Event
	for {
		select {
		case e := <-d.events:
			if e.Kind == k {
				return e
			}
			seen = append(seen, e)
		case <-timeout:
			d.t.Fatalf("no %q within %s; seen %+v", k, patience, seen)
		}
	}
}

// openings counts how often the bolt has moved, by what is known now.
func (d *door) openings() (n int) {
	for {
		select {
		case e := <-d.events:
			if e.Kind == device.Opened {
				n++
			}
		default:
			return n
		}
	}
}

// outcome waits until a command has ended, and answers with it.
func (r *rig) outcome(c creds, id lock.ID, command any) reply {
	r.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		a := r.want(r.send("GET", "/locks/"+id.String()+"/commands/"+command.(string), c, nil), http.StatusOK)
		if a.get("outcome") != "pending" {
			return a
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("command %v is still pending", command)
		}
		position := r.position()
		ctx, cancel := context.WithTimeout(r.t.Context(), time.Second)
		_ = r.db.Wait(ctx, position)
		cancel()
	}
}

// position is the log's end.
func (r *rig) position() (p event.Position) {
	r.t.Helper()
	for {
		records, err := r.db.After(r.t.Context(), p, 1000)
		if err != nil {
			r.t.Fatal(err)
		}
		if len(records) == 0 {
			return p
		}
		p = records[len(records)-1].Position
	}
}

// logBuffer keeps what the server logs.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) tail(most int) string {
	s := l.String()
	return s[max(0, len(s)-most):]
}
