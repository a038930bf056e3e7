package device

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// A bench is a device whose loop runs without a network, in a bubble of
// synthetic time.
type bench struct {
	t      *testing.T
	d      *Device
	err    chan error
	mu     sync.Mutex
	sent   []sentMessage
	events []Event
}

type sentMessage struct {
	topic  string
	token  string
	result string // "id result reason" of an update's openResult
	lock   string
}

// onBench runs test with a device that is connected. Its first get and its
// first report are not answered yet.
func onBench(t *testing.T, faults Faults, test func(*bench)) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		b := &bench{t: t, err: make(chan error, 1)}
		b.d = mustDevice(t, Config{Thing: "T", StateDir: t.TempDir(), RelockAfter: 5 * time.Second, Faults: faults,
			Observe: b.observe})
		b.d.publish = b.capture
		go func() { b.err <- b.d.loop(ctx) }()
		b.link(Connected)
		test(b)
		cancel()
		synctest.Wait()
	})
}

func mustDevice(t interface {
	Helper()
	Fatal(...any)
}, cfg Config) *Device {
	t.Helper()
	d, err := newDevice(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func (b *bench) capture(topic string, body any) {
	wire, _ := json.Marshal(body)
	var m struct {
		ClientToken string
		State       struct {
			Reported struct {
				Lock       string
				OpenResult *struct{ ID, Result, Reason string }
			}
		}
	}
	if err := json.Unmarshal(wire, &m); err != nil {
		panic(err) // the device's own words
	}
	s := sentMessage{topic: topic, token: m.ClientToken, lock: m.State.Reported.Lock}
	if r := m.State.Reported.OpenResult; r != nil {
		s.result = fmt.Sprintf("%s %s %s", r.ID, r.Result, r.Reason)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sent = append(b.sent, s)
}

func (b *bench) observe(e Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = append(b.events, e)
}

// sentTo lists what was sent to topic.
func (b *bench) sentTo(topic string) (all []sentMessage) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.sent {
		if s.topic == topic {
			all = append(all, s)
		}
	}
	return all
}

func (b *bench) link(kind Kind) {
	b.d.links <- linkChange{kind: kind}
	synctest.Wait()
}

func (b *bench) deliver(topic, payload string) {
	m := message{topic: topic}
	if err := json.Unmarshal([]byte(payload), &m); err != nil {
		b.t.Fatal(err)
	}
	b.d.messages <- m
	synctest.Wait()
}

func (b *bench) delta(version int, open string) {
	b.deliver("update/delta", fmt.Sprintf(`{"version":%d,"state":{"open":%s}}`, version, open))
}

// last is the last message that was sent to topic.
func (b *bench) last(topic string) sentMessage {
	all := b.sentTo(topic)
	return all[len(all)-1]
}

// answerGet answers the last get with the true time; open may be empty.
func (b *bench) answerGet(version int, open string) {
	delta := ""
	if open != "" {
		delta = `"delta":{"open":` + open + `}`
	}
	b.deliver("get/accepted", fmt.Sprintf(`{"state":{%s},"version":%d,"timestamp":%d,"clientToken":%q}`,
		delta, version, time.Now().Unix(), b.last("get").token))
}

func (b *bench) accept() {
	b.deliver("update/accepted", fmt.Sprintf(`{"clientToken":%q}`, b.last("update").token))
}

// settleIn answers what a device sends when it has connected.
func (b *bench) settleIn() {
	b.answerGet(1, "")
	b.accept()
}

func (b *bench) pass(d time.Duration) {
	time.Sleep(d) // synthetic
	synctest.Wait()
}

func openFor(id string, lifetime time.Duration) string {
	wire, _ := json.Marshal(Command{id, time.Now(), time.Now().Add(lifetime)})
	return string(wire)
}

func (b *bench) outcomes() (all []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.events {
		if e.Kind == Opened || e.Kind == Refused || e.Kind == Failed {
			all = append(all, fmt.Sprintf("%s %s %s", e.CommandID, e.Kind, e.Reason))
		}
	}
	return all
}

func (b *bench) want(outcomes ...string) {
	b.t.Helper()
	if got := b.outcomes(); !slices.Equal(got, outcomes) {
		b.t.Fatalf("outcomes %q, want %q", got, outcomes)
	}
}

func TestOpensReportsAndRelocks(t *testing.T) {
	onBench(t, Faults{}, func(b *bench) {
		b.settleIn()
		b.delta(2, openFor("a", sec(10)))
		b.want("a opened ")
		if s := b.last("update"); s.result != "a opened " || s.lock != "unlocked" {
			t.Fatalf("first report: %+v", s)
		}
		b.accept()
		b.pass(sec(4.9))
		if s := b.last("update"); s.lock != "unlocked" {
			t.Fatalf("relocked early: %+v", s)
		}
		b.pass(sec(0.2))
		if s := b.last("update"); s.result != "" || s.lock != "locked" {
			t.Fatalf("after relocking: %+v", s)
		}
	})
}

// The expiry is checked when the bolt is about to move, not when the message
// arrives.
func TestExpiryIsCheckedWhenTheBoltMoves(t *testing.T) {
	for slow, want := range map[time.Duration]string{
		sec(9):  "a opened ",
		sec(10): "a refused expired",
	} {
		onBench(t, Faults{Slow: slow}, func(b *bench) {
			b.settleIn()
			b.delta(2, openFor("a", sec(10)))
			b.want()
			b.pass(sec(11))
			b.want(want)
		})
	}
}

func TestUnsynchronisedBoundsTheAgeByItsOwnGet(t *testing.T) {
	onBench(t, Faults{Unsynchronised: true, ClockOffset: -time.Hour}, func(b *bench) {
		b.settleIn()
		b.pass(time.Minute) // the first get is old
		open := openFor("a", sec(10))
		b.delta(2, open)
		b.want()
		b.answerGet(2, open)
		b.want("a opened ")
	})
}

func TestUnsynchronisedRefusesWithoutAnAnswer(t *testing.T) {
	onBench(t, Faults{Unsynchronised: true}, func(b *bench) {
		b.settleIn()
		b.pass(time.Minute)
		b.delta(2, openFor("a", sec(10)))
		b.pass(answerTimeout)
		b.want("a refused clock_unsynchronised")
	})
	onBench(t, Faults{Unsynchronised: true}, func(b *bench) {
		b.settleIn()
		b.pass(time.Minute)
		b.delta(2, openFor("a", sec(10)))
		b.deliver("get/rejected", fmt.Sprintf(`{"code":429,"clientToken":%q}`, b.last("get").token))
		b.want("a refused clock_unsynchronised")
	})
}

// An answer to another get was written at another time: believed, it could make
// an old command look young.
func TestOnlyTheAnswerToItsOwnGetTellsTheTime(t *testing.T) {
	onBench(t, Faults{Unsynchronised: true}, func(b *bench) {
		b.settleIn()
		b.pass(time.Minute)
		open := openFor("a", sec(10))
		b.pass(time.Minute) // it was held up on its way
		b.delta(2, open)
		b.deliver("get/accepted", fmt.Sprintf(`{"state":{"delta":{"open":%s}},"version":2,"timestamp":%d,"clientToken":"of-another"}`,
			open, time.Now().Add(-time.Minute).Unix()))
		b.want()
		b.answerGet(2, open)
		b.want("a refused expired")
	})
}

func TestWhatTheShadowLeavesOutIsRefused(t *testing.T) {
	onBench(t, Faults{Slow: sec(3)}, func(b *bench) {
		b.settleIn()
		b.delta(5, openFor("a", sec(10)))
		b.link(Disconnected)
		b.link(Connected)
		b.answerGet(4, "") // written before the command was: says nothing about it
		b.want()
		b.link(Disconnected)
		b.link(Connected)
		b.answerGet(6, "")
		b.want("a refused withdrawn")
		b.pass(time.Minute)
		b.want("a refused withdrawn")
	})
}

func TestANewerCommandReplacesOneThatHasNotBegun(t *testing.T) {
	onBench(t, Faults{Slow: sec(3)}, func(b *bench) {
		b.settleIn()
		first := openFor("a", sec(10))
		b.delta(2, first)
		b.pass(sec(1))
		b.delta(3, openFor("b", sec(10)))
		b.delta(2, first) // late on its way
		b.pass(sec(2))    // the bolt went on getting ready
		b.want("a failed superseded", "b opened ")
		if s := b.last("update"); s.result != "a failed superseded" {
			t.Fatalf("reports out of order: %+v", s)
		}
		b.accept()
		if s := b.last("update"); s.result != "b opened " {
			t.Fatalf("each result is reported by itself: %+v", s)
		}
	})
}

// The shadow merges reports: without the null, a later "opened" would keep the
// reason of an earlier refusal.
func TestAnOpeningClearsTheReason(t *testing.T) {
	d := mustDevice(t, Config{Thing: "T", StateDir: t.TempDir()})
	wire, err := json.Marshal(d.updateBody(&update{result: &record{Command: Command{"a", t0, t0.Add(sec(1))}, Result: Opened, At: 7}}))
	if err != nil || !bytes.Contains(wire, []byte(`"openResult":{"id":"a","result":"opened","at":7,"reason":null}`)) {
		t.Fatalf("%s, %v", wire, err)
	}
}

func TestARepeatedCommandRepeatsItsResult(t *testing.T) {
	onBench(t, Faults{}, func(b *bench) {
		b.settleIn()
		open := openFor("a", sec(10))
		b.delta(2, open)
		b.delta(3, open) // before its report was accepted: nothing to add
		b.accept()
		reports := len(b.sentTo("update"))
		b.delta(4, open) // after: the shadow must have lost it
		b.want("a opened ")
		if s := b.sentTo("update"); len(s) != reports+1 || s[reports].result != "a opened " {
			t.Fatalf("%+v", s[reports:])
		}
	})
}

func TestAReportIsRepeatedUntilItIsAccepted(t *testing.T) {
	onBench(t, Faults{}, func(b *bench) {
		b.settleIn()
		b.delta(2, openFor("a", sec(10)))
		first := b.last("update").token
		b.deliver("update/rejected", fmt.Sprintf(`{"code":429,"message":"slow down","clientToken":%q}`, first))
		b.pass(answerTimeout)
		if s := b.last("update"); s.token == first || s.result != "a opened " {
			t.Fatalf("not sent again: %+v", s)
		}
		b.deliver("update/accepted", `{"clientToken":"of-another"}`)
		b.link(Disconnected)
		b.link(Connected)
		if s := b.last("update"); s.result != "a opened " {
			t.Fatalf("not sent again after the connection was lost: %+v", s)
		}
		b.accept()
		reports := len(b.sentTo("update"))
		b.pass(time.Minute)
		if s := b.sentTo("update"); len(s) != reports {
			t.Fatalf("sent again after it was accepted: %+v", s[reports:])
		}
	})
}

func TestAReportThatCannotBeAcceptedIsGivenUp(t *testing.T) {
	onBench(t, Faults{}, func(b *bench) {
		b.settleIn()
		b.delta(2, openFor("a", sec(10)))
		b.deliver("update/rejected", fmt.Sprintf(`{"code":400,"message":"Invalid JSON","clientToken":%q}`, b.last("update").token))
		b.delta(3, openFor("b", sec(10)))
		if s := b.last("update"); s.result != "b opened " {
			t.Fatalf("stuck behind the rejected report: %+v", s)
		}
	})
}

// Anybody who may write to the shadow can write desired.OPEN or desired.delta;
// only desired.open is guarded.
func TestOnlyOpenIsACommand(t *testing.T) {
	onBench(t, Faults{}, func(b *bench) {
		b.settleIn()
		open := openFor("a", sec(10))
		b.deliver("update/delta", `{"version":2,"state":{"OPEN":`+open+`,"delta":{"open":`+open+`}}}`)
		b.deliver("update/accepted", `{"version":2,"state":{"desired":{"open":`+open+`}}}`)
		b.want()
		b.deliver("update/delta", `{"version":3,"state":{"delta":"odd","open":`+open+`}}`)
		b.want("a opened ")
	})
}

func TestAMalformedCommandIsIgnored(t *testing.T) {
	onBench(t, Faults{}, func(b *bench) {
		b.settleIn()
		b.delta(2, `["a",1]`)
		b.want()
		b.mu.Lock()
		defer b.mu.Unlock()
		if e := b.events[len(b.events)-1]; e.Kind != Ignored {
			t.Fatalf("%+v", e)
		}
	})
}

// A lock that cannot remember the id must not move the bolt.
func TestNoMemoryNoOpening(t *testing.T) {
	onBench(t, Faults{}, func(b *bench) {
		b.settleIn()
		if err := os.RemoveAll(b.d.cfg.StateDir); err != nil {
			t.Fatal(err)
		}
		b.delta(2, openFor("a", sec(10)))
		b.want()
		if err := <-b.err; err == nil || !b.d.locked {
			t.Fatalf("error %v, locked %v", err, b.d.locked)
		}
	})
}

// Never twice for one id, whatever is delivered and however often the power
// goes, at the worst of moments.
func TestNothingOpensTwice(t *testing.T) {
	dirs := 0
	base := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		dirs++
		dir := filepath.Join(base, fmt.Sprint(dirs))
		opened, results := map[string]int{}, map[string]Kind{}
		justOpened := false
		start := func() *Device {
			justOpened = false
			d := mustDevice(t, Config{Thing: "T", StateDir: dir, RelockAfter: time.Hour, Observe: func(e Event) {
				switch e.Kind {
				case Opened, Refused, Failed:
					if first, ok := results[e.CommandID]; ok && e.Reason != string(ReasonInterrupted) {
						t.Fatalf("%s was %s, then %s", e.CommandID, first, e.Kind)
					}
					results[e.CommandID] = e.Kind
				}
				if e.Kind == Opened {
					opened[e.CommandID]++
				}
				justOpened = e.Kind == Opened
			}})
			d.measured = &measurement{time.Now().Truncate(time.Second), time.Now(), time.Now()}
			if err := d.resume(); err != nil {
				t.Fatal(err)
			}
			return d
		}
		d := start()
		version := int64(0)
		t.Repeat(map[string]func(*rapid.T){
			"deliver": func(t *rapid.T) {
				version++
				id := rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "id")
				if err := d.take([]byte(openFor(id, time.Hour)), version); err != nil {
					t.Fatal(err)
				}
				if err := d.advance(); err != nil {
					t.Fatal(err)
				}
			},
			"bolt is ready": func(t *rapid.T) {
				d.bolt = ready
				if err := d.advance(); err != nil {
					t.Fatal(err)
				}
			},
			"power goes while the bolt moves": func(t *rapid.T) {
				if !justOpened {
					t.Skip("the bolt has not moved")
				}
				loseLastLine(t, filepath.Join(dir, "seen.jsonl")) // the result
				d = start()
			},
			"power goes": func(t *rapid.T) {
				tear(t, filepath.Join(dir, "seen.jsonl"))
				d = start()
			},
			"": func(t *rapid.T) {
				for id, n := range opened {
					if n > 1 {
						t.Fatalf("%s opened %d times", id, n)
					}
				}
			},
		})
	})
}

// loseLastLine undoes the last write.
func loseLastLine(t *rapid.T, path string) {
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(data, []byte("\n"))
	if err := os.WriteFile(path, bytes.TrimSuffix(data, lines[len(lines)-2]), 0o600); err != nil {
		t.Fatal(err)
	}
}

// tear leaves half a line behind.
func tear(t *rapid.T, path string) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(`{"open":["torn",17`); err != nil {
		t.Fatal(err)
	}
}
