package shadow

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/keyed"
)

// Row is a shadow as it is stored.
type Row struct {
	Thing, Name string
	Document    []byte // Document.Encode
}

// ErrNoDocument says that a shadow was never stored.
var ErrNoDocument = errors.New("shadow: no document")

// Storage is where shadows last.
type Storage interface {
	// LoadShadow refuses with ErrNoDocument.
	LoadShadow(context.Context, Address) ([]byte, error)
	// SaveShadows returns once the rows are durable, all or none of them.
	SaveShadows(context.Context, ...Row) error
}

// Bus takes messages to devices.
type Bus interface {
	// Publish sends to whoever has subscribed, with QoS 1 and never retained. It
	// does not wait for delivery.
	Publish(topic string, payload []byte)
	// Present says whether a thing has a live session that would receive commands.
	Present(thing string) bool
	// Command sends to one thing's live session. After until nothing of it may
	// reach a wire any more: a session that has not acknowledged by then is reset.
	// acked, unless nil, is called once the device has acknowledged. Refuses with
	// ErrOffline when nothing was or will be sent.
	Command(thing, topic string, payload []byte, until clock.Deadline, acked func()) error
}

// ErrOffline says that a thing has no live session: nothing was sent to it and
// nothing waits for it.
var ErrOffline = errors.New("shadow: the device is offline")

// Report is what a device says in reported.openResult about one command.
type Report struct {
	ID     string `json:"id"`
	Result string `json:"result"` // "opened", "refused" or "failed"
	At     int64  `json:"at"`     // epoch ms by the device's clock
	Reason string `json:"reason"` // "jammed", "low_battery" …
}

// Fields of the classic shadow that only the command path and the device's own
// reports may touch.
const (
	openField   = "open"
	resultField = "openResult"
)

// Service is the embedded Device Shadow service. It keeps the documents, answers
// get, update and delete, and is the way of commands to devices: only Stage puts
// an open into a desired state, and nobody is ever shown one that this process
// did not stage itself or whose time is over.
type Service struct {
	docs    Storage
	bus     Bus
	clock   clock.Clock
	log     *slog.Logger
	reports func(context.Context, string, Report) error

	things keyed.Mutex[string] // serialises work on one thing's shadows
	mu     sync.Mutex
	live   map[string]live // by thing
}

// live is the command that a thing may be shown.
type live struct {
	id    string
	until clock.Deadline
}

// NewService makes the service. reports is called with every outcome that a
// device reports, before the report is accepted; if it fails, so does the
// device's update, and the device reports again.
func NewService(docs Storage, bus Bus, c clock.Clock, log *slog.Logger, reports func(ctx context.Context, thing string, r Report) error) *Service {
	return &Service{docs: docs, bus: bus, clock: c, log: log, reports: reports, live: map[string]live{}}
}

// Handle answers a request that arrived at a request topic from a thing's own
// authenticated connection, by publishing to the response topics.
func (s *Service) Handle(ctx context.Context, from string, a Address, op Operation, payload []byte) {
	err := s.do(ctx, from, a, op, payload)
	if err == nil {
		return
	}
	var no *Error
	if !errors.As(err, &no) {
		s.log.Error("shadow request failed", "thing", a.Thing, "shadow", a.Name, "operation", op, "error", err)
		token, _ := ParseRequest(payload)
		no = ErrInternal.For(token)
	}
	s.bus.Publish(a.Topic(string(op)+"/rejected"), no.Rejected(s.clock.Wall()))
}

func (s *Service) do(ctx context.Context, from string, a Address, op Operation, payload []byte) error {
	switch op {
	case OpGet:
		return s.get(ctx, a, payload)
	case OpDelete:
		return s.delete(ctx, a, payload)
	default:
		return s.update(ctx, from, a, payload)
	}
}

func (s *Service) get(ctx context.Context, a Address, payload []byte) error {
	defer s.things.Lock(a.Thing)()
	doc, token, err := s.existing(ctx, a, payload)
	if err != nil {
		return err
	}
	s.tell(a, "get/accepted", doc, func(d Document) ([]byte, bool) {
		return d.GetAccepted(token, s.clock.Wall()), true
	})
	return nil
}

func (s *Service) delete(ctx context.Context, a Address, payload []byte) error {
	defer s.things.Lock(a.Thing)()
	doc, token, err := s.existing(ctx, a, payload)
	if err != nil {
		return err
	}
	gone := doc.Delete()
	if err := s.docs.SaveShadows(ctx, row(a, gone)); err != nil {
		return err
	}
	s.bus.Publish(a.Topic("delete/accepted"), DeleteAccepted(gone, token, s.clock.Wall()))
	return nil
}

// existing finds the shadow that a get or delete is about. The caller holds the
// thing.
func (s *Service) existing(ctx context.Context, a Address, payload []byte) (doc Document, token string, err error) {
	if token, err = ParseRequest(payload); err != nil {
		return doc, token, err
	}
	if doc, err = s.load(ctx, a); err == nil && !doc.Exists() {
		err = notFound(a).For(token)
	}
	return doc, token, err
}

func (s *Service) update(ctx context.Context, from string, a Address, payload []byte) error {
	u, err := ParseUpdate(payload)
	if err != nil {
		return err
	}
	if err := s.hear(ctx, from, a, u); err != nil {
		return err
	}
	defer s.things.Lock(a.Thing)()
	before, err := s.load(ctx, a)
	if err != nil {
		return err
	}
	if commands(a, u, before) {
		return ErrForbidden.For(u.ClientToken)
	}
	now := s.clock.Wall()
	after, err := before.Apply(u, now)
	if err != nil {
		return err
	}
	if err := s.docs.SaveShadows(ctx, row(a, after)); err != nil {
		return err
	}
	s.bus.Publish(a.Topic("update/accepted"), UpdateAccepted(u, after, now))
	s.tell(a, "update/delta", after, func(d Document) ([]byte, bool) { return d.Delta(u.ClientToken, now) })
	s.document(a, before, after, u.ClientToken, now)
	return nil
}

// tell publishes what a thing may act on. With a live command in it, it has
// the command's deadline, as the command itself had; a session that cannot be
// held to one is not told of the command.
func (s *Service) tell(a Address, suffix string, d Document, body func(Document) ([]byte, bool)) {
	if until, ok := s.shown(a, d); ok {
		b, ok := body(d)
		if !ok || s.bus.Command(a.Thing, a.Topic(suffix), b, until, nil) == nil {
			return
		}
	}
	if b, ok := body(without(a, d)); ok {
		s.bus.Publish(a.Topic(suffix), b)
	}
}

// document publishes what an update has changed. A command is never in it: that
// leaves by its delta and by get alone, where it has its deadline.
func (s *Service) document(a Address, before, after Document, token string, now time.Time) {
	s.bus.Publish(a.Topic("update/documents"), Documents(without(a, before), without(a, after), token, now))
}

// commands says whether an update would touch the command in a desired state,
// which is for Stage alone.
func commands(a Address, u Update, d Document) bool {
	if a.Name != "" || !u.DesiredHas(openField) {
		return false
	}
	_, holds := d.Desired(openField)
	return holds || u.Desired.raw.Kind() != jsontext.KindNull
}

// hear passes a reported outcome on. Only the thing itself may speak of what
// its door did.
func (s *Service) hear(ctx context.Context, from string, a Address, u Update) error {
	result, ended := u.Reports(resultField)
	_, echoed := u.Reports(openField)
	if a.Name != "" || !ended && !echoed {
		return nil
	}
	if from != a.Thing {
		return ErrForbidden.For(u.ClientToken)
	}
	if !ended || string(result) == "null" {
		return nil
	}
	r, err := parseReport(result)
	if err != nil {
		return (&Error{Code: 400, Message: err.Error()}).For(u.ClientToken)
	}
	return s.reports(ctx, a.Thing, r)
}

// without is a document without its command, if it holds one.
func without(a Address, d Document) Document {
	if _, ok := d.Desired(openField); !ok || a.Name != "" {
		return d
	}
	return d.Without(openField)
}

// shown answers with the deadline of a document's command if that may be shown
// to its thing now.
func (s *Service) shown(a Address, d Document) (clock.Deadline, bool) {
	raw, ok := d.Desired(openField)
	if !ok || a.Name != "" {
		return clock.Deadline{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.live[a.Thing]
	return l.until, ok && l.id == commandID(raw) && !s.clock.Passed(l.until)
}

// show lets a command be shown in place of the one before it.
func (s *Service) show(thing string, l live) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live[thing] = l
}

// hide lets a command be shown no more.
func (s *Service) hide(thing, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live[thing].id == id {
		delete(s.live, thing)
	}
}

func (s *Service) load(ctx context.Context, a Address) (Document, error) {
	b, err := s.docs.LoadShadow(ctx, a)
	if errors.Is(err, ErrNoDocument) {
		return Document{}, nil
	}
	if err != nil {
		return Document{}, fmt.Errorf("load shadow of %s: %w", a.Thing, err)
	}
	return DecodeDocument(b)
}

func row(a Address, d Document) Row {
	return Row{Thing: a.Thing, Name: a.Name, Document: d.Encode()}
}

func notFound(a Address) *Error {
	if a.Name != "" {
		return NotFound(a.Name)
	}
	return NotFound(a.Thing)
}
