package control_test

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/access"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/event"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/shadow"
	"github.com/openlock/openlock/internal/store"
)

// The simulation runs the whole cloud (the real store, shadow service and
// command path) against simulated clients, devices, networks and clocks, on one
// goroutine. One seed decides everything that happens, so that whatever breaks
// a promise of the open-lock protocol can be seen again:
//
//	OPENLOCK_SEED=17 go test -run Simulation ./internal/control
//	OPENLOCK_SOAK=1h go test -v -run Simulation -timeout 0 ./internal/control

// simSteps of one seed.
const simSteps = 400

var (
	settings = control.DefaultSettings
	epoch    = time.Date(2026, 5, 29, 12, 0, 0, 0, time.UTC)
)

type ctxt = context.Context

// sim is one simulated world.
type sim struct {
	ctx    ctxt
	seed   uint64
	rng    *rand.Rand
	folder string
	lines  []string // what has happened
	broken bool     // a promise was

	// Time.
	now  time.Duration // since epoch, as it truly is
	step time.Duration // by which the server's wall clock is off

	// The server.
	db      *store.DB
	control *control.Control
	shadows *shadow.Service
	fuse    int    // touches of the world until the server dies; 0: it lives
	full    bool   // its disk is
	atID    func() // what happens while a command gets its id

	// The world outside.
	doors   []*door
	keys    map[string]int // API keys that each organisation has had
	revoked map[string]bool
	calls   []*call

	// What is known of what has happened.
	position event.Position
	locks    map[event.Stream]*knownLock
	commands map[string]*command
	made     []string // ids, oldest first
	calling  *call
	received time.Duration // the call that is being served
	names    map[string]name
	stats    stats

	weights []int // of actions
	weight  int   // of all
}

type stats struct {
	steps, commands, moves, late, replayed, unsent, refused, deaths int
	outcomes                                                        map[string]int
}

func (s *stats) add(o stats) {
	s.steps, s.commands, s.moves, s.late = s.steps+o.steps, s.commands+o.commands, s.moves+o.moves, s.late+o.late
	s.replayed, s.unsent, s.refused, s.deaths = s.replayed+o.replayed, s.unsent+o.unsent, s.refused+o.refused, s.deaths+o.deaths
	if s.outcomes == nil {
		s.outcomes = map[string]int{}
	}
	for k, n := range o.outcomes {
		s.outcomes[k] += n
	}
}

func (s stats) String() string {
	return fmt.Sprintf("%d steps, %d deaths of the server, %d commands, %d openings of doors, %d late reports, %d replays, %d 502s, %d refusals, outcomes %v",
		s.steps, s.deaths, s.commands, s.moves, s.late, s.replayed, s.unsent, s.refused, s.outcomes)
}

// call is what a client wants; it may ask several times.
type call struct {
	by              string
	lock            lock.ID
	request, header string
	reason          string
	caller          string // auth.Principal.Caller
}

// names are what a repetition of the call is known by.
func (c *call) names() (names []string) {
	if c.request != "" {
		names = append(names, c.caller+"|request:"+c.lock.String()+":"+c.request)
	}
	if c.header != "" {
		names = append(names, c.caller+"|header:"+c.header)
	}
	return names
}

func TestSimulation(t *testing.T) {
	if seed := os.Getenv("OPENLOCK_SEED"); seed != "" {
		simulate(t, must(strconv.ParseUint(seed, 10, 64)))
		return
	}
	if soak := os.Getenv("OPENLOCK_SOAK"); soak != "" {
		soakFor(t, must(time.ParseDuration(soak)))
		return
	}
	var all stats
	for seed := range uint64(simSeeds) {
		all.add(simulate(t, seed+1))
	}
	t.Logf("%d seeds: %s", simSeeds, all)
	if all.moves == 0 || all.replayed == 0 || all.deaths == 0 || all.late == 0 || all.unsent == 0 {
		t.Error("the simulation no longer reaches what it is to test")
	}
}

// soakFor runs seeds that no run has used before.
func soakFor(t *testing.T, length time.Duration) {
	var all stats
	start, said := time.Now(), time.Now()
	first := uint64(start.UnixNano())
	for n := uint64(0); time.Since(start) < length; n++ {
		all.add(simulate(t, first+n))
		if time.Since(said) > 10*time.Second {
			said = time.Now()
			fmt.Printf("%s: %d seeds: %s\n", time.Since(start).Round(time.Second), n+1, all)
		}
	}
}

func TestOneSeedTellsOneStory(t *testing.T) {
	first, second := run(t, 7), run(t, 7)
	for i := range min(len(first.lines), len(second.lines)) {
		if first.lines[i] != second.lines[i] {
			t.Fatalf("line %d:\n%s\n%s", i, first.lines[i], second.lines[i])
		}
	}
	if len(first.lines) != len(second.lines) {
		t.Errorf("%d lines, then %d", len(first.lines), len(second.lines))
	}
}

// simulate runs a seed and fails the test when a promise was broken.
func simulate(t *testing.T, seed uint64) stats {
	t.Helper()
	s := run(t, seed)
	if s.broken {
		t.Fatalf("OPENLOCK_SEED=%d\n%s", seed, strings.Join(s.lines, "\n"))
	}
	return s.stats
}

func run(t *testing.T, seed uint64) *sim {
	s := &sim{
		ctx: context.Background(), seed: seed, rng: rand.New(rand.NewPCG(seed, 0)), folder: t.TempDir(),
		keys: map[string]int{}, revoked: map[string]bool{}, locks: map[event.Stream]*knownLock{},
		commands: map[string]*command{}, names: map[string]name{}, stats: stats{outcomes: map[string]int{}},
	}
	defer func() { _ = os.RemoveAll(s.folder) }()
	s.start()
	defer func() { _ = s.db.Close() }()
	s.settle()
	s.chooseWeights()
	for s.stats.steps < simSteps && !s.broken {
		s.act()
	}
	if !s.broken {
		s.log("everything must end now")
		s.fillDisk(false)
		s.pass(settings.Expiry+settings.Skew+time.Minute, true)
		s.observe()
		s.checkAll()
	}
	return s
}

// settle makes organisations, credentials, users and locks.
func (s *sim) settle() {
	s.makeDisk()
	for _, org := range []string{"acme", "bolt"} {
		check(s.db.CreateOrganization(s.ctx, store.Organization{ID: org}))
		s.newKey(org)
	}
	for _, l := range []struct {
		id  lock.ID
		org string
	}{{1, "acme"}, {2, "acme"}, {3, "bolt"}} {
		cmd := lock.Create{
			ID: l.id, UUID: "uuid-" + l.id.String(), OrgID: l.org, OwnerID: "olga",
			Keys: []lock.Key{{UUID: "k1", UserID: "karl"}},
		}
		_ = must(s.control.Do(s.ctx, s.request(&call{by: "super", lock: l.id}), cmd))
		d := &door{s: s, id: l.id, thing: l.id.Thing(), seen: map[string]*memory{}}
		d.offset, d.slow = s.about(6*time.Second), []time.Duration{0, 500 * time.Millisecond, 5 * time.Second, 15 * time.Second}[s.rng.IntN(4)]
		s.doors = append(s.doors, d)
		s.connect(d)
	}
	s.observe()
}

// makeDisk lets the store's disk be full: see fillDisk.
func (s *sim) makeDisk() {
	db := must(sql.Open("sqlite", filepath.Join(s.folder, store.File)))
	defer func() { check(db.Close()) }()
	_ = must(db.ExecContext(s.ctx, `CREATE TRIGGER simulated_disk BEFORE INSERT ON events
		WHEN (SELECT value FROM settings WHERE name = 'simulated disk') = 'full'
		BEGIN SELECT RAISE(ABORT, 'simulated: the disk is full'); END`))
}

func (s *sim) newKey(org string) {
	s.keys[org]++
	id := s.key(org)
	check(s.db.CreateCredential(s.ctx, store.Credential{ID: id, Kind: store.APIKey, Hash: []byte(id), Org: org, CreatedAt: epoch}))
}

func (s *sim) key(org string) string { return fmt.Sprintf("%s-%d", org, s.keys[org]) }

// about is a span of at most d, in either direction.
func (s *sim) about(d time.Duration) time.Duration {
	return time.Duration(s.rng.Int64N(2*d.Milliseconds()+1)-d.Milliseconds()) * time.Millisecond
}

// The server: it dies and starts.

// death is what the server dies of.
type death string

// touch is called whenever the server touches the world. It may die there.
func (s *sim) touch(what string) {
	if s.fuse == 0 {
		return
	}
	if s.fuse--; s.fuse == 0 {
		panic(death(what))
	}
}

// clock is the server's, for those who watch it.
func (s *sim) clock() clock.Clock {
	return clock.Clock{
		Wall:   func() time.Time { return epoch.Add(s.now + s.step) },
		Steady: func() time.Time { return epoch.Add(s.now) },
	}
}

// mortalClock is the server's own.
func (s *sim) mortalClock() clock.Clock {
	c := s.clock()
	return clock.Clock{
		Wall:   func() time.Time { s.touch("Wall"); return c.Wall() },
		Steady: func() time.Time { s.touch("Steady"); return c.Steady() },
	}
}

func (s *sim) newID() string {
	s.touch("newID")
	c := &command{id: fmt.Sprintf("c%04d", len(s.made)+1), by: s.calling, received: s.received, run: s.stats.deaths}
	s.commands[c.id] = c
	s.made = append(s.made, c.id)
	if s.atID != nil {
		s.atID()
	}
	return c.id
}

// start opens the store, makes the server and lets it recover.
func (s *sim) start() {
	for {
		s.db = must(store.Open(s.ctx, s.folder))
		if s.full {
			s.fillDisk(false) // or it would not start
		}
		died := mortal(func() {
			c, quiet := s.mortalClock(), slog.New(slog.DiscardHandler)
			s.control = control.New(s.db, c, quiet, settings, s.newID)
			s.shadows = shadow.NewService(storage{s}, bus{s}, c, quiet, s.control.Report)
			s.control.Use(s.shadows)
			must(s.control.Recover(s.ctx))
		})
		if s.observe(); died == "" {
			s.fuse = 0
			return
		}
		s.log("the server dies while it starts, at %s", died)
		check(s.db.Close())
	}
}

// mortal says what do died of, "" if it lives.
func mortal(do func()) (died string) {
	defer func() {
		if r := recover(); r != nil {
			died = string(r.(death))
		}
	}()
	do()
	return ""
}

// serve lets the server do something. It says whether the server lived through
// it; if not, another one runs by now.
func (s *sim) serve(what string, do func()) bool {
	s.log("server: %s", what)
	if s.fuse = 0; s.rng.IntN(40) == 0 {
		s.fuse = 1 + s.rng.IntN(25)
	}
	died := mortal(do)
	if died == "" {
		s.fuse = 0
		s.observe()
		return true
	}
	s.die(died)
	return false
}

// die ends the server and starts another one a little later.
func (s *sim) die(of string) {
	s.stats.deaths++
	s.observe()
	s.log("the server dies at %s", of)
	check(s.db.Close())
	s.atID, s.fuse = nil, 0
	for _, d := range s.doors {
		d.link.server, d.link.held = false, nil
	}
	s.elapse(time.Duration(s.rng.IntN(4)) * time.Duration(s.rng.IntN(4000)) * time.Millisecond)
	if s.rng.IntN(4) == 0 {
		s.fuse = 1 + s.rng.IntN(12) // it dies again while it starts
	}
	s.start()
	s.log("the server has started")
}

// Time passes.

// elapse lets time pass for all but the server, which does not look.
func (s *sim) elapse(d time.Duration) {
	s.now += d
	for _, d := range s.doors {
		d.tick()
	}
}

// pass lets time pass in steps. Unless the server is stalled, it sweeps, and
// resets the sessions that it must.
func (s *sim) pass(d time.Duration, awake bool) {
	s.log("%s pass, awake %t", d, awake)
	for end := s.now + d; s.now < end && !s.broken; {
		step := min(end-s.now, max(200*time.Millisecond, d/100))
		s.elapse(step)
		if !awake {
			continue
		}
		s.resetOverdue()
		if s.serveQuietly(s.sweep) && !s.full {
			s.checkEnds(min(step, time.Second))
		}
	}
	s.resetOverdue()
}

func (s *sim) sweep() {
	if err := s.control.Sweep(s.ctx); err != nil && !s.full {
		s.fail("%v", err)
	}
}

// serveQuietly is serve without a line for each.
func (s *sim) serveQuietly(do func()) bool {
	n := len(s.lines)
	lived := s.serve("sweeps", do)
	if lived && len(s.lines) == n+1 {
		s.lines = s.lines[:n]
	}
	return lived
}

// Calls.

// principal is who calls, as the authenticator would have found.
func (s *sim) principal(who string) auth.Principal {
	switch who {
	case "super":
		return auth.Principal{Subject: access.Subject{Super: true}, Actor: "operator"}
	case "acme", "bolt":
		id := s.key(who)
		return auth.Principal{
			Subject: access.Subject{Org: who, Scopes: access.Scopes}, Actor: "org:" + who,
			Credential: "key:" + id, Standing: store.Standing{Credentials: []string{id}},
		}
	}
	return auth.Principal{
		Subject: access.Subject{User: who}, Actor: "user:" + who,
		Credential: "jwt:issuer#" + who, Standing: store.Standing{User: who, Token: "token-" + who},
	}
}

func (s *sim) request(c *call) control.Request {
	p := s.principal(c.by)
	c.caller = p.Caller()
	sum := sha256.Sum256(fmt.Append(nil, c.lock, c.request, c.reason))
	return control.Request{By: p, Lock: c.lock, Received: s.clock().In(0), IdempotencyKey: c.header, Fingerprint: sum[:]}
}

// send lets a client ask for the door, for the first time or again.
func (s *sim) send(c *call) {
	r := s.request(c)
	s.calling, s.received = c, s.now
	if s.rng.IntN(20) == 0 {
		s.elapse(time.Duration(s.rng.IntN(9000)) * time.Millisecond) // the call waits its turn
	}
	before := len(s.made)
	var a control.Answer
	var err error
	lived := s.serve(fmt.Sprintf("%+v", *c), func() {
		a, err = s.control.Open(s.ctx, r, control.OpenRequest{RequestID: c.request, Reason: c.reason})
	})
	s.atID = nil
	var made []*command
	for _, id := range s.made[before:] {
		made = append(made, s.commands[id])
	}
	if !lived {
		s.log("no answer")
		return
	}
	s.log("answer: version %d, replayed %t, error %v", a.Version, a.Replayed, err)
	s.checkAnswer(c, made, a, err)
}

// manage lets somebody change a lock.
func (s *sim) manage(by string, id lock.ID, cmd lock.Command) {
	r := s.request(&call{by: by, lock: id})
	var err error
	s.serve(fmt.Sprintf("%s: %T%+v on lock %s", by, cmd, cmd, id), func() { _, err = s.control.Do(s.ctx, r, cmd) })
	if err != nil {
		s.log("answer: %v", err)
		s.expectRefusal(err)
	}
}

// Notes.

func (s *sim) log(format string, args ...any) {
	s.lines = append(s.lines, fmt.Sprintf("%9.3f  ", s.now.Seconds())+fmt.Sprintf(format, args...))
}

// fail notes that a promise was broken.
func (s *sim) fail(format string, args ...any) {
	s.broken = true
	s.log("BROKEN: "+format, args...)
}

func must[T any](v T, err error) T {
	check(err)
	return v
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
