package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/device"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// process is the built binary, serving.
type process struct {
	t          *testing.T
	cmd        *exec.Cmd
	http, mqtt string
}

var (
	apiLine    = regexp.MustCompile(`API +http://(\S+)`)
	deviceLine = regexp.MustCompile(`devices +mqtts://(\S+)`)
)

// serveBinary starts the binary and returns once it listens.
func serveBinary(t *testing.T, data, http, mqtt string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(binary(t), "serve", "--data", data, "--http", http, "--mqtt", mqtt)}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	p.cmd.Stderr = &log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	lines := bufio.NewScanner(out)
	for lines.Scan() && p.mqtt == "" {
		if m := apiLine.FindStringSubmatch(lines.Text()); m != nil {
			p.http = m[1]
		}
		if m := deviceLine.FindStringSubmatch(lines.Text()); m != nil {
			p.mqtt = m[1]
		}
	}
	if p.mqtt == "" {
		p.kill()
		t.Fatalf("the server did not start: %s", log.String())
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	return p
}

// kill ends the process as a power cut would end it.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// answered is a 200 that a client has seen.
type answered struct {
	lock    lock.ID
	command string
	version int64
}

// crowd opens doors until it is told to stop, whatever the server does.
type crowd struct {
	key, url string
	stop     chan struct{}
	done     sync.WaitGroup

	mu  sync.Mutex
	got []answered
}

func (c *crowd) start(locks []lock.ID, callers int) {
	for i := range callers {
		c.done.Go(func() {
			client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{}}
			for n := i; ; n++ {
				select {
				case <-c.stop:
					return
				default:
					c.open(client, locks[n%len(locks)])
				}
			}
		})
	}
}

func (c *crowd) open(client *http.Client, id lock.ID) {
	req, err := http.NewRequest("POST", c.url+openPath(id), nil)
	if err != nil {
		panic(err)
	}
	req.Header.Set("X-API-Key", c.key)
	resp, err := client.Do(req)
	if err != nil {
		return // the server is dead just now
	}
	defer func() { _ = resp.Body.Close() }()
	var body struct {
		Version int64
		Command struct{ ID string }
	}
	if resp.StatusCode != http.StatusOK || json.NewDecoder(resp.Body).Decode(&body) != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.got = append(c.got, answered{id, body.Command.ID, body.Version})
}

func seedOf(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("OPENLOCK_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("OPENLOCK_SEED: %v", err)
		}
		seed = n
	}
	t.Logf("seed: OPENLOCK_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// cycles is how often the server is killed; OPENLOCK_CRASHES asks for more.
func cycles(t *testing.T) int {
	if s := os.Getenv("OPENLOCK_CRASHES"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("OPENLOCK_CRASHES: %v", err)
		}
		return n
	}
	return 20
}

// The server is killed at random while doors are opened. Afterwards every 200
// has its event, every movement of a door has its event, no door has moved
// twice or late, no version is missing and every command has one outcome.
func TestKilledAtAnyMoment(t *testing.T) {
	random := seedOf(t)
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	f, err := openFolder(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.registry.CreateOrganization(t.Context(), "acme", ""); err != nil {
		t.Fatal(err)
	}
	key, _, err := f.registry.Create(t.Context(), auth.NewCredential{Kind: store.APIKey, Org: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	p := serveBinary(t, data, "127.0.0.1:0", "127.0.0.1:0")
	locks := []lock.ID{1, 2, 3}
	doors := map[lock.ID]*door{}
	for _, id := range locks {
		if status := create(t, p, key, id); status != http.StatusCreated {
			t.Fatalf("CreateLock: %d", status)
		}
		folder := filepath.Join(dir, id.Thing())
		if err := f.enroll(t.Context(), id, folder); err != nil {
			t.Fatal(err)
		}
		d := &door{t: t, config: deviceConfig(id, folder, p.mqtt), events: make(chan device.Event, 1<<20)}
		d.run()
		d.await(device.Connected)
		doors[id] = d
	}
	c := &crowd{key: key, url: "http://" + p.http, stop: make(chan struct{})}
	c.start(locks, 4)
	for range cycles(t) {
		moment := time.NewTimer(time.Duration(random.IntN(400)) * time.Millisecond)
		<-moment.C // the moment of the crash is the test's input, not a wait for something
		p.kill()
		p = serveBinary(t, data, p.http, p.mqtt)
	}
	close(c.stop)
	c.done.Wait()
	p.kill()
	serveBinary(t, data, p.http, p.mqtt) // closes what is unfinished
	total := 0
	for _, id := range locks {
		doors[id].stop()
		h := audit(t, f.db, id)
		opened := doors[id].opened()
		checkDoor(t, h, opened)
		for _, a := range c.got {
			if a.lock == id && h.requested[a.command].Version != a.version {
				t.Errorf("lock %s: 200 for command %s at version %d, the log has %d", id, a.command, a.version, h.requested[a.command].Version)
			}
		}
		total += len(opened)
	}
	t.Logf("%d crashes, %d answers of 200, %d movements of doors", cycles(t), len(c.got), total)
	if len(c.got) == 0 || total == 0 {
		t.Error("nothing was opened: the test shows nothing")
	}
	if err := f.db.Close(); err != nil {
		t.Error(err)
	}
}

func create(t *testing.T, p *process, key string, id lock.ID) int {
	t.Helper()
	body := fmt.Sprintf(`{"index": %s, "uuid": "u%s"}`, id, id)
	req, err := http.NewRequest("POST", "http://"+p.http+"/locks/"+id.String()+"/CreateLock", bytes.NewReader([]byte(body)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// opened is every movement of the bolt so far.
func (d *door) opened() (all []device.Event) {
	for {
		select {
		case e := <-d.events:
			if e.Kind == device.Opened {
				all = append(all, e)
			}
		default:
			return all
		}
	}
}

// Invariants 6 and 11 over a long history: every open has its request and its
// one outcome, and no version is missing.
func TestTenThousandOpensInARow(t *testing.T) {
	opens := 10_000
	if underRace {
		opens = 1_000
	}
	r := newRig(t)
	acme := r.org("acme")
	r.createLock(7, acme)
	d := r.device(7, func(c *device.Config) {})
	moved := make(chan []device.Event)
	stop := make(chan struct{})
	go func() { moved <- d.collect(stop) }()
	var last any
	for range opens {
		last = r.want(r.send("POST", openPath(7), acme, nil), http.StatusOK).get("command", "id")
	}
	if end := r.outcome(acme, 7, last); end.get("outcome") != "opened" {
		t.Errorf("the last one: %s", end.raw)
	}
	r.restart() // ends commands that newer ones have overtaken and whose time is not over
	d.stop()
	close(stop)
	h := audit(t, r.db, 7)
	if len(h.requested) != opens {
		t.Errorf("%d requests in the log", len(h.requested))
	}
	checkDoor(t, h, <-moved)
}

// collect keeps the movements of the bolt until stop is closed.
func (d *door) collect(stop chan struct{}) (all []device.Event) {
	for {
		select {
		case e := <-d.events:
			if e.Kind == device.Opened {
				all = append(all, e)
			}
		case <-stop:
			return append(all, d.opened()...)
		}
	}
}
