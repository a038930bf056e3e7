// Package device is a simulated lock, and the reference for the authors of
// firmware: it does exactly what the open-lock protocol asks of a device.
//
// Deciding and doing are apart. rules.go says what may be done, as a pure
// function of a command and the situation; seen.go remembers commands durably;
// this file is the device's one loop, which does one thing at a time; link.go
// is its connection. The way of one command:
//
//	it arrives        -> decide: may it open the door?
//	the bolt is ready -> decide again, because time has passed
//	                  -> remember its id durably, move the bolt, remember the result
//	                  -> report the result until the shadow has accepted it
//
// All that it knows of the server are the Device Shadow's topics and documents,
// so it runs against any service that keeps those rules.
package device

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/eclipse/paho.golang/autopaho"
)

// Config describes one simulated lock.
type Config struct {
	Thing      string // the lock's name, also its MQTT client id
	Broker     string // host:port, spoken to with TLS
	ServerName string // the name in the broker's certificate; default: Broker's host
	CertFile   string // the device's certificate, PEM
	KeyFile    string // its private key, PEM
	CAFile     string // who signed the broker's certificate, PEM
	StateDir   string // the device's own folder, made if missing: what survives a restart

	RelockAfter time.Duration // how long the door stays unlocked; default 5 s
	Faults      Faults

	// Observe, if set, is called for each event, in order. The device waits for
	// it, so it must return soon.
	Observe func(Event)
}

// Faults are what can be wrong with a lock. The zero value is a good lock.
type Faults struct {
	OfflineFor     time.Duration // does not connect for so long after the start
	Slow           time.Duration // the bolt takes so long before it moves
	Jam            bool          // the bolt does not move
	LowBattery     bool          // the battery is too low to move it
	LoseAck        bool          // the bolt moves, but no result is ever reported
	ClockOffset    time.Duration // the wall clock is so far ahead
	Unsynchronised bool          // the wall clock is known to mean nothing
}

const (
	// answerTimeout is how long the device waits for the answer to a get or an
	// update before it gives up the one or sends the other again.
	answerTimeout = 5 * time.Second

	defaultRelockAfter = 5 * time.Second
	openingsPerPercent = 1000 // of the battery
)

var thingName = regexp.MustCompile(`^[a-zA-Z0-9:_-]{1,128}$`)

// A Device is a simulated lock.
type Device struct {
	cfg     Config
	tls     *tls.Config
	journal *journal

	// The link's side.
	manager      atomic.Pointer[autopaho.ConnectionManager]
	offlineUntil atomic.Pointer[time.Time]
	publishing   sync.WaitGroup
	publish      func(topic string, body any) // sends without waiting; body becomes JSON

	// What the loop waits for.
	links      chan linkChange
	messages   chan message
	boltReady  *time.Timer
	relock     *time.Timer
	unanswered *time.Timer // the get
	unaccepted *time.Timer // the update

	// What the loop knows. Only the loop touches it.
	question *question    // the get that waits for its answer
	measured *measurement // the last answered get
	current  *pending     // the command that is not decided yet
	bolt     boltStage
	outbox   []record // results to report, oldest first
	sending  *update  // the report that waits for its answer
	changed  bool     // the state differs from what was last sent
	online   bool
	locked   bool
	battery  int // percent
	openings int
}

// A boltStage is how far the bolt is from moving.
type boltStage int

const (
	atRest boltStage = iota
	preparing
	ready
)

// A pending command has arrived and waits for the bolt or the time.
type pending struct {
	Command
	version    int64 // of the shadow that it was last seen in
	withdrawn  bool
	unanswered bool // the get that it waited for was not answered
}

// A question is a get on its way.
type question struct {
	token string
	sent  time.Time // with the monotonic clock
}

// A measurement is an answered question. Its times hold the monotonic clock.
type measurement struct {
	timestamp      time.Time // the server's
	sent, answered time.Time
}

// An update is a report on its way.
type update struct {
	token  string
	result *record // nil: only the state
}

// New makes a device from cfg; Run brings it to life. It fails on a bad name,
// unreadable certificates, and a StateDir whose memory of commands is damaged.
func New(cfg Config) (*Device, error) {
	if !thingName.MatchString(cfg.Thing) {
		return nil, fmt.Errorf("device: thing name %q: want %s", cfg.Thing, thingName)
	}
	if _, _, err := net.SplitHostPort(cfg.Broker); err != nil {
		return nil, fmt.Errorf("device: broker: %w", err)
	}
	if cfg.RelockAfter == 0 {
		cfg.RelockAfter = defaultRelockAfter
	}
	identity, err := loadTLS(cfg)
	if err != nil {
		return nil, err
	}
	return newDevice(cfg, identity)
}

func newDevice(cfg Config, identity *tls.Config) (*Device, error) {
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("device: state folder: %w", err)
	}
	seen, err := openJournal(filepath.Join(cfg.StateDir, "seen.jsonl"))
	if err != nil {
		return nil, err
	}
	battery := 100
	if cfg.Faults.LowBattery {
		battery = minBattery - 1
	}
	return &Device{
		cfg: cfg, tls: identity, journal: seen,
		links: make(chan linkChange), messages: make(chan message),
		boltReady: stopped(), relock: stopped(), unanswered: stopped(), unaccepted: stopped(),
		changed: true, locked: true, battery: battery,
	}, nil
}

func loadTLS(cfg Config) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("device: certificate: %w", err)
	}
	ca, err := os.ReadFile(cfg.CAFile)
	if err != nil {
		return nil, fmt.Errorf("device: CA: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("device: CA: no certificate in " + cfg.CAFile)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		RootCAs:      roots,
		ServerName:   cfg.ServerName,
		MinVersion:   tls.VersionTLS12,
	}, nil
}

// stopped makes a timer that does not run yet.
func stopped() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// Run keeps the device connected and obedient until ctx ends; then it returns
// nil. It returns an error when the device can no longer remember commands:
// such a lock must not open. Run may be called once.
func (d *Device) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	disconnect, err := d.connect(ctx)
	if err != nil {
		return err
	}
	err = d.loop(ctx)
	cancel()
	disconnect()
	return err
}

// loop does one thing at a time, until ctx ends or the memory fails.
func (d *Device) loop(ctx context.Context) error {
	err := d.resume()
	for err == nil {
		select {
		case <-ctx.Done():
			return nil
		case change := <-d.links:
			d.onLink(change)
		case m := <-d.messages:
			err = d.onMessage(m)
		case <-d.boltReady.C:
			d.bolt = ready
			err = d.advance()
		case <-d.unanswered.C:
			err = d.giveUpQuestion()
		case <-d.unaccepted.C:
			d.unsend()
			d.flush()
		case <-d.relock.C:
			d.lock()
		}
	}
	return err
}

// resume takes up what a restart has interrupted. A command whose id is
// remembered without a result may or may not have moved the bolt; it is never
// tried again.
func (d *Device) resume() error {
	for _, r := range d.journal.undelivered() {
		if r.Result != "" {
			d.enqueue(r)
		} else if err := d.finish(r.Command, Failed, ReasonInterrupted); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) onLink(change linkChange) {
	switch {
	case change.kind == Unreachable:
		d.observe(Event{Kind: Unreachable, Reason: change.reason})
		return
	case change.kind == Disconnected && !d.online:
		return // it was never subscribed
	}
	// Whatever was on its way through the old connection has no answer any more.
	d.online = change.kind == Connected
	d.question = nil
	d.unanswered.Stop()
	d.unsend()
	d.observe(Event{Kind: change.kind})
	d.get()
	d.flush()
}

func (d *Device) onMessage(m message) error {
	switch m.topic {
	case "update/delta":
		return d.onDelta(m)
	case "get/accepted":
		return d.onAnswer(m)
	case "get/rejected":
		if d.question != nil && m.ClientToken == d.question.token {
			return d.giveUpQuestion()
		}
	case "update/accepted":
		return d.onAccepted(m)
	case "update/rejected":
		return d.onRejected(m)
	}
	return nil
}

func (d *Device) onDelta(m message) error {
	if err := d.take(m.open(), m.Version); err != nil {
		return err
	}
	return d.advance()
}

// onAnswer takes the time and the command from the answer to the device's own
// get. Any other answer is passed over: measured against the wrong question, an
// old timestamp would look new.
func (d *Device) onAnswer(m message) error {
	if d.question == nil || m.ClientToken != d.question.token {
		return nil
	}
	d.measured = &measurement{time.Unix(m.Timestamp, 0), d.question.sent, time.Now()}
	d.question = nil
	d.unanswered.Stop()
	open := m.open()
	if open == nil && d.current != nil && m.Version >= d.current.version {
		d.current.withdrawn = true
	}
	if err := d.take(open, m.Version); err != nil {
		return err
	}
	return d.advance()
}

// take makes desired.open, as this version of the shadow holds it, the current
// command. The shadow holds one command, and so does the device: a newer one
// replaces an older one whose bolt has not moved.
func (d *Device) take(open []byte, version int64) error {
	if open == nil || d.current != nil && version < d.current.version {
		return nil // nothing, or overtaken on its way
	}
	var c Command
	if err := c.UnmarshalJSON(open); err != nil {
		d.observe(Event{Kind: Ignored, Reason: err.Error()})
		return nil
	}
	if d.current != nil && d.current.ID == c.ID {
		d.current.version = version
		return nil
	}
	if d.current != nil {
		if err := d.finish(d.current.Command, Failed, ReasonSuperseded); err != nil {
			return err
		}
	}
	d.current = &pending{Command: c, version: version}
	if _, seen := d.journal.find(c.ID); !seen {
		d.observe(Event{Kind: Commanded, CommandID: c.ID})
	}
	return nil
}

// advance takes the current command as far as it can go now.
func (d *Device) advance() error {
	if d.current == nil {
		return nil
	}
	v := Decide(d.current.Command, d.situation())
	switch {
	case v.Action == Ask:
		d.get()
		return nil
	case v.Action == Open && d.bolt != ready:
		d.prepare()
		return nil
	}
	c := d.dismiss()
	switch v.Action {
	case Open:
		return d.open(c)
	case Refuse:
		return d.finish(c, Refused, v.Reason)
	case Fail:
		return d.finish(c, Failed, v.Reason)
	default: // Repeat
		d.repeat(c)
		return nil
	}
}

// dismiss lets go of the current command, which is decided, and of the bolt.
func (d *Device) dismiss() Command {
	c := d.current.Command
	d.current = nil
	d.bolt = atRest
	d.boltReady.Stop()
	return c
}

func (d *Device) situation() Situation {
	_, seen := d.journal.find(d.current.ID)
	return Situation{
		Seen:       seen,
		Withdrawn:  d.current.withdrawn,
		Now:        d.wall(),
		ClockLost:  d.cfg.Faults.Unsynchronised,
		Reading:    d.reading(),
		Unanswered: d.current.unanswered,
		Jammed:     d.cfg.Faults.Jam,
		Battery:    d.battery,
	}
}

// wall is what the device's wall clock shows.
func (d *Device) wall() time.Time {
	return time.Now().Add(d.cfg.Faults.ClockOffset).Round(0)
}

func (d *Device) reading() *Reading {
	if d.measured == nil {
		return nil
	}
	m := *d.measured
	return &Reading{m.timestamp, time.Since(m.sent), time.Since(m.answered)}
}

// prepare gets the bolt ready to move.
func (d *Device) prepare() {
	if d.bolt == atRest {
		d.bolt = preparing
		d.boltReady.Reset(d.cfg.Faults.Slow)
	}
}

// open moves the bolt for c. The id is durable before the bolt moves: after a
// loss of power in between the door is shut and stays so.
func (d *Device) open(c Command) error {
	if err := d.journal.put(record{Command: c, At: d.wall().UnixMilli()}); err != nil {
		return err
	}
	d.locked = false
	d.openings++
	if d.openings%openingsPerPercent == 0 {
		d.battery--
	}
	d.relock.Reset(d.cfg.RelockAfter)
	return d.finish(c, Opened, "")
}

func (d *Device) lock() {
	d.locked = true
	d.changed = true
	d.observe(Event{Kind: Relocked})
	d.flush()
}

// finish makes the result of c durable and reports it. A refusal is remembered
// as well as an opening: once reported, it must stay true.
func (d *Device) finish(c Command, result Kind, reason Reason) error {
	r := record{Command: c, Result: result, Reason: reason, At: d.wall().UnixMilli()}
	if err := d.journal.put(r); err != nil {
		return err
	}
	d.observe(Event{Kind: result, CommandID: c.ID, Reason: string(reason)})
	d.enqueue(r)
	d.flush()
	return nil
}

// repeat reports the result of a command that came again.
func (d *Device) repeat(c Command) {
	r, _ := d.journal.find(c.ID)
	d.enqueue(r)
	d.flush()
}

// get asks for the shadow, unless that is already under way.
func (d *Device) get() {
	if !d.online || d.question != nil {
		return
	}
	d.question = &question{token: rand.Text(), sent: time.Now()}
	d.unanswered.Reset(answerTimeout)
	d.publish("get", getBody{d.question.token})
	d.observe(Event{Kind: Asked})
}

// giveUpQuestion lets a command that waits for the time go on without it.
func (d *Device) giveUpQuestion() error {
	d.question = nil
	d.unanswered.Stop()
	if d.current != nil {
		d.current.unanswered = true
	}
	return d.advance()
}

// enqueue takes the result of a command to be reported, once.
func (d *Device) enqueue(r record) {
	if d.cfg.Faults.LoseAck {
		return
	}
	for _, waiting := range d.outbox {
		if waiting.Command.ID == r.Command.ID {
			return
		}
	}
	d.outbox = append(d.outbox, r)
}

// flush sends the next report, if there is one. One is on its way at a time, so
// that they arrive in order; each result has its own, since the shadow holds
// one openResult.
func (d *Device) flush() {
	switch {
	case !d.online || d.sending != nil:
	case len(d.outbox) > 0:
		next := d.outbox[0]
		d.send(&next)
	case d.changed:
		d.send(nil)
	}
}

func (d *Device) send(result *record) {
	d.sending = &update{token: rand.Text(), result: result}
	d.changed = false // every report carries the state
	d.unaccepted.Reset(answerTimeout)
	d.publish("update", d.updateBody(d.sending))
}

// unsend takes back a report that was not answered; flush sends it again.
func (d *Device) unsend() {
	if d.sending != nil {
		d.sending = nil
		d.changed = true
		d.unaccepted.Stop()
	}
}

func (d *Device) onAccepted(m message) error {
	if d.sending == nil || m.ClientToken != d.sending.token {
		return nil // another client's update of this shadow
	}
	e := Event{Kind: Reported}
	if r := d.sending.result; r != nil {
		e.CommandID = r.Command.ID
	}
	d.observe(e)
	return d.settle()
}

// onRejected gives up a report that the shadow will never accept. One that only
// came at a bad time is sent again when its answer is overdue.
func (d *Device) onRejected(m message) error {
	if d.sending == nil || m.ClientToken != d.sending.token {
		return nil
	}
	d.observe(Event{Kind: Unreported, Reason: fmt.Sprintf("%d %s", m.Code, m.Message)})
	if m.Code == 429 || m.Code >= 500 {
		return nil
	}
	return d.settle()
}

// settle ends the report that is on its way and sends the next.
func (d *Device) settle() error {
	result := d.sending.result
	d.sending = nil
	d.unaccepted.Stop()
	if result != nil {
		d.outbox = d.outbox[1:]
		result.Delivered = true
		if err := d.journal.put(*result); err != nil {
			return err
		}
	}
	d.flush()
	return nil
}

func (d *Device) observe(e Event) {
	if d.cfg.Observe == nil {
		return
	}
	r := d.reading()
	e.At = d.wall()
	e.State = State{
		Online:       d.online,
		Synchronised: !d.cfg.Faults.Unsynchronised && r != nil && r.Synchronised(e.At),
		Locked:       d.locked,
		Battery:      d.battery,
	}
	d.cfg.Observe(e)
}
