package device_test

import (
	"bytes"
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/device"
)

// A lock is a running device with its events.
type lock struct {
	t      *testing.T
	device *device.Device
	events chan device.Event
	ctx    context.Context
	stop   func() // and wait for the end
}

func (s *service) start(t *testing.T, dir string, faults device.Faults) *lock {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	l := &lock{t: t, events: make(chan device.Event, 100), ctx: ctx}
	d, err := device.New(device.Config{
		Thing: "T", Broker: s.addr, StateDir: dir, RelockAfter: 100 * time.Millisecond, Faults: faults,
		CertFile: s.certs.certFile, KeyFile: s.certs.keyFile, CAFile: s.certs.caFile,
		Observe: func(e device.Event) { l.events <- e },
	})
	check(t, err)
	l.device = d
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	l.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		ended <- nil
	}
	t.Cleanup(l.stop)
	return l
}

// until waits for an event of one of these kinds and returns it.
func (l *lock) until(kinds ...device.Kind) device.Event {
	l.t.Helper()
	for {
		select {
		case e := <-l.events:
			if slices.Contains(kinds, e.Kind) {
				return e
			}
		case <-l.ctx.Done():
			l.t.Fatalf("no %s", kinds)
		}
	}
}

// untilReported waits until the result of the command was accepted.
func (l *lock) untilReported(id string) {
	l.t.Helper()
	for l.until(device.Reported).CommandID != id {
	}
}

// result waits for the report of a result, and passes over those of the state.
func (s *service) result(l *lock) update {
	l.t.Helper()
	for {
		select {
		case u := <-s.updates:
			if u.State.Reported.OpenResult != nil {
				return u
			}
		case <-l.ctx.Done():
			l.t.Fatal("no result is reported")
		}
	}
}

func wantResult(t *testing.T, u update, id, result, reason string) {
	t.Helper()
	r := u.State.Reported.OpenResult
	got := ""
	if r.Reason != nil {
		got = *r.Reason
	}
	if r.ID != id || r.Result != result || got != reason {
		t.Fatalf("reported %s %s %q, want %s %s %q", r.ID, r.Result, got, id, result, reason)
	}
}

func (s *service) commandFor(id string, lifetime time.Duration) {
	s.command(id, time.Now(), time.Now().Add(lifetime))
}

func TestConnectsAsTheProtocolAsks(t *testing.T) {
	s := startService(t)
	l := s.start(t, t.TempDir(), device.Faults{})
	l.until(device.Connected)
	if c := <-s.connects; !c.Clean || c.ClientIdentifier != "T" {
		t.Errorf("clean session %v, client id %q", c.Clean, c.ClientIdentifier)
	}
	client, _ := s.broker.Clients.Get("T")
	var topics []string
	for topic, sub := range client.State.Subscriptions.GetAll() {
		topics = append(topics, strings.TrimPrefix(topic, prefix))
		if sub.Qos != 1 {
			t.Errorf("%s: QoS %d", topic, sub.Qos)
		}
	}
	slices.Sort(topics)
	want := []string{"get/accepted", "get/rejected", "update/accepted", "update/delta", "update/rejected"}
	if !slices.Equal(topics, want) {
		t.Errorf("subscribed to %q", topics)
	}
	if u := <-s.updates; u.State.Reported.Lock != "locked" || u.State.Reported.Battery != 100 || u.State.Reported.Door != "closed" {
		t.Errorf("first report %+v", u.State.Reported)
	}
	// Again on the second connection, which a client library may treat otherwise.
	l.device.GoOffline(0)
	l.until(device.Disconnected)
	l.until(device.Connected)
	if c := <-s.connects; !c.Clean {
		t.Error("no clean session on reconnect")
	}
}

func TestOpensOverTheNetwork(t *testing.T) {
	s := startService(t)
	l := s.start(t, t.TempDir(), device.Faults{})
	l.until(device.Reported)
	s.commandFor("a", 10*time.Second)
	if e := l.until(device.Opened); e.CommandID != "a" || e.State.Locked || !e.State.Synchronised {
		t.Fatalf("%+v", e)
	}
	u := s.result(l)
	wantResult(t, u, "a", "opened", "")
	if u.State.Reported.Lock != "unlocked" || !bytes.Equal(u.State.Reported.Open, s.desired) {
		t.Fatalf("%+v", u.State.Reported)
	}
	l.untilReported("a")
	if e := l.until(device.Relocked); !e.State.Locked {
		t.Fatalf("%+v", e)
	}
	l.until(device.Reported)
	if u := <-s.updates; u.State.Reported.Lock != "locked" || u.State.Reported.OpenResult != nil {
		t.Fatalf("%+v", u.State.Reported)
	}
}

func TestRefusesWhatHasExpired(t *testing.T) {
	s := startService(t)
	l := s.start(t, t.TempDir(), device.Faults{})
	l.until(device.Reported)
	s.command("a", time.Now().Add(-10*time.Second), time.Now().Add(-time.Second))
	wantResult(t, s.result(l), "a", "refused", "expired")
}

// A command that waits in the shadow when the device comes on is judged as any.
func TestACommandMayWaitInTheShadow(t *testing.T) {
	s := startService(t)
	s.commandFor("a", 10*time.Second)
	l := s.start(t, t.TempDir(), device.Faults{OfflineFor: 300 * time.Millisecond})
	wantResult(t, s.result(l), "a", "opened", "")
}

func TestFaultsAreReported(t *testing.T) {
	for reason, faults := range map[string]device.Faults{"jammed": {Jam: true}, "low_battery": {LowBattery: true}} {
		t.Run(reason, func(t *testing.T) {
			s := startService(t)
			l := s.start(t, t.TempDir(), faults)
			l.until(device.Reported)
			s.commandFor("a", 10*time.Second)
			wantResult(t, s.result(l), "a", "failed", reason)
			if e := l.until(device.Failed); !e.State.Locked {
				t.Fatalf("%+v", e)
			}
		})
	}
}

func TestALostAckIsNeverReported(t *testing.T) {
	s := startService(t)
	l := s.start(t, t.TempDir(), device.Faults{LoseAck: true})
	l.until(device.Reported)
	s.commandFor("a", 10*time.Second)
	l.until(device.Opened)
	l.until(device.Relocked)
	l.until(device.Reported)
	l.device.GoOffline(0)
	l.until(device.Connected)
	s.commandFor("b", 10*time.Second)
	l.until(device.Relocked)
	l.until(device.Reported)
	l.stop()
	close(s.updates)
	for u := range s.updates {
		if u.State.Reported.OpenResult != nil {
			t.Fatalf("reported %+v", u.State.Reported.OpenResult)
		}
	}
}

func TestReportsAgainAfterTheConnectionWasLost(t *testing.T) {
	s := startService(t)
	l := s.start(t, t.TempDir(), device.Faults{})
	l.until(device.Reported)
	s.setDeaf(true)
	s.commandFor("a", 10*time.Second)
	wantResult(t, s.result(l), "a", "opened", "")
	l.device.GoOffline(200 * time.Millisecond)
	l.until(device.Disconnected)
	s.setDeaf(false)
	wantResult(t, s.result(l), "a", "opened", "")
	l.untilReported("a")
}

// The shadow still asks for a command whose result it never got; the restarted
// device reports it, once, and does not open again.
func TestReportsAgainAfterARestart(t *testing.T) {
	s, dir := startService(t), t.TempDir()
	l := s.start(t, dir, device.Faults{})
	l.until(device.Reported)
	s.setDeaf(true)
	s.commandFor("a", 10*time.Second)
	wantResult(t, s.result(l), "a", "opened", "")
	l.stop()
	s.setDeaf(false)

	l = s.start(t, dir, device.Faults{})
	if e := l.until(device.Opened, device.Reported); e.Kind == device.Opened || e.CommandID != "a" {
		t.Fatalf("%+v", e)
	}
	wantResult(t, s.result(l), "a", "opened", "")
	l.stop()

	l = s.start(t, dir, device.Faults{})
	if e := l.until(device.Opened, device.Reported); e.Kind == device.Opened || e.CommandID != "" {
		t.Fatalf("reported again after it was accepted: %+v", e)
	}
}

func TestAnUnsynchronisedLockAsksForTheTime(t *testing.T) {
	s := startService(t)
	l := s.start(t, t.TempDir(), device.Faults{ClockOffset: -time.Hour})
	l.until(device.Reported)
	s.commandFor("a", 10*time.Second)
	if e := l.until(device.Opened); e.State.Synchronised {
		t.Fatal("an hour off, and synchronised")
	}
	s.command("b", time.Now().Add(-12*time.Second), time.Now().Add(-2*time.Second))
	l.until(device.Refused)
	wantResult(t, s.result(l), "a", "opened", "")
	wantResult(t, s.result(l), "b", "refused", "expired")
}

func TestABrokerThatIsNotOursIsRefused(t *testing.T) {
	s := startService(t)
	s.certs.caFile = makeCerts(t).caFile
	l := s.start(t, t.TempDir(), device.Faults{})
	if e := l.until(device.Unreachable); !strings.Contains(e.Reason, "certificate") {
		t.Fatal(e.Reason)
	}
}

func TestDrawPrintsALineAnEvent(t *testing.T) {
	var out bytes.Buffer
	draw := device.Draw(&out, "front-door")
	at := time.Date(2026, 5, 29, 12, 0, 0, 7e6, time.UTC)
	draw(device.Event{At: at, Kind: device.Opened, CommandID: "a"})
	draw(device.Event{At: at, Kind: device.Refused, CommandID: "b", Reason: "expired"})
	draw(device.Event{At: at, Kind: device.Connected})
	want := "front-door 12:00:00.007 opened       a\n" +
		"front-door 12:00:00.007 refused      b (expired)\n" +
		"front-door 12:00:00.007 connected\n"
	if out.String() != want {
		t.Fatalf("%q", out.String())
	}
}

func TestNewRefusesWhatCannotWork(t *testing.T) {
	c := makeCerts(t)
	good := device.Config{Thing: "T", Broker: "localhost:8883", CertFile: c.certFile, KeyFile: c.keyFile, CAFile: c.caFile, StateDir: t.TempDir()}
	if _, err := device.New(good); err != nil {
		t.Fatal(err)
	}
	for what, spoil := range map[string]func(*device.Config){
		"a name with a wildcard": func(c *device.Config) { c.Thing = "a/+" },
		"no port":                func(c *device.Config) { c.Broker = "localhost" },
		"no certificate":         func(c *device.Config) { c.CertFile = "" },
		"an empty CA":            func(c *device.Config) { c.CAFile = os.DevNull },
		"a file for a folder":    func(c *device.Config) { c.StateDir = os.DevNull },
	} {
		bad := good
		spoil(&bad)
		if _, err := device.New(bad); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}
