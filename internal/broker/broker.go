// Package broker is where devices connect: MQTT 3.1.1 and 5 over TLS with client
// certificates. Certificate, client id and thing are the same name, and a device
// may publish, subscribe and leave a Last Will only under that name.
//
// It is the shadow service's Bus and no general message broker. What a device
// publishes goes to the shadow service and to nobody else; what it is sent comes
// from there. Sessions are always clean, so that nothing waits for a device that
// comes back, and a message that carries a command has a deadline to the last
// byte: see outbox.
package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/shadow"
)

// Handler takes a shadow request from a thing's own authenticated connection.
// The request is acknowledged to the device when it returns.
type Handler func(ctx context.Context, thing string, a shadow.Address, op shadow.Operation, payload []byte)

const (
	// helloWithin bounds the TLS handshake, and then the wait for CONNECT.
	helloWithin = 5 * time.Second
	// pauseFull is how long accepting rests when no file descriptor is free.
	pauseFull = 100 * time.Millisecond
)

// Broker takes devices' connections.
type Broker struct {
	tls    *tls.Config
	clock  clock.Clock
	log    *slog.Logger
	handle Handler

	revoked func(context.Context) (map[string]bool, error)

	closing context.Context
	close   context.CancelFunc
	work    sync.WaitGroup

	mu       sync.Mutex
	listener net.Listener
	sessions map[string]*session // by thing
}

// New makes a broker that nobody can reach before Serve. revoked lists the
// serial numbers, in hexadecimal, of certificates that are no longer good.
func New(cert tls.Certificate, ca *CA, revoked func(context.Context) (map[string]bool, error), c clock.Clock, log *slog.Logger) *Broker {
	b := &Broker{
		tls: &tls.Config{
			Certificates: []tls.Certificate{cert},
			ClientAuth:   tls.RequireAndVerifyClientCert,
			ClientCAs:    ca.Pool(),
			MinVersion:   tls.VersionTLS12,
			NextProtos:   []string{"x-amzn-mqtt-ca", "mqtt"},
		},
		revoked: revoked, clock: c, log: log, sessions: map[string]*session{},
	}
	b.closing, b.close = context.WithCancel(context.Background())
	return b
}

// Serve takes devices on a socket from now on, and gives their requests to h.
func (b *Broker) Serve(l *net.TCPListener, h Handler) {
	b.handle, b.listener = h, l
	b.work.Go(func() { b.accept(l) })
	b.work.Go(b.inspect)
}

// inspectEvery is how soon a session whose certificate is revoked or has ended
// is cut; it is less than the 5 s that are promised.
const inspectEvery = 2 * time.Second

// inspect cuts sessions whose certificates are no longer good.
func (b *Broker) inspect() {
	tick := time.NewTicker(inspectEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-b.closing.Done():
			return
		}
		revoked, err := b.revoked(b.closing)
		if err != nil && b.closing.Err() == nil {
			b.log.Error("revoked certificates could not be read; tried again", "error", err)
		}
		for _, s := range b.all() {
			if c := s.certificate(); revoked[Serial(c)] || b.clock.Wall().After(c.NotAfter) {
				s.stop(packets.ErrNotAuthorized)
			}
		}
	}
}

func (b *Broker) all() (all []*session) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.sessions {
		all = append(all, s)
	}
	return all
}

// refuses says whether a certificate is revoked. When that cannot be found out,
// nobody is let in.
func (b *Broker) refuses(c *x509.Certificate) bool {
	revoked, err := b.revoked(b.closing)
	if err != nil {
		b.log.Error("a device is refused because revoked certificates could not be read", "error", err)
	}
	return err != nil || revoked[Serial(c)]
}

// Serial is a certificate's serial number as it is written down, hexadecimal.
func Serial(c *x509.Certificate) string { return c.SerialNumber.Text(16) }

func (b *Broker) accept(l *net.TCPListener) {
	for {
		c, err := l.AcceptTCP()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			b.refused(err)
			time.Sleep(pauseFull)
		default:
			b.work.Go(func() { b.shake(c) })
		}
	}
}

func (b *Broker) refused(err error) {
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		b.log.Error("no file descriptor is free for another device: raise `ulimit -n`", "error", err)
		return
	}
	b.log.Error("a device's connection could not be accepted", "error", err)
}

// shake does the TLS handshake and runs the session that follows.
func (b *Broker) shake(tcp *net.TCPConn) {
	defer func() { _ = tcp.Close() }()
	defer context.AfterFunc(b.closing, func() { _ = tcp.SetReadDeadline(time.Now()) })() // the session then ends itself
	if err := setUserTimeout(tcp); err != nil {
		b.log.Error("TCP_USER_TIMEOUT could not be set", "error", err)
		return
	}
	wire := newWire(tcp, b.clock)
	c := tls.Server(wire, b.tls)
	ctx, cancel := context.WithTimeout(b.closing, helloWithin)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		b.log.Info("TLS handshake with a device failed", "remote", tcp.RemoteAddr().String(), "error", err)
		return
	}
	name := c.ConnectionState().PeerCertificates[0].Subject.CommonName
	newSession(b, name, wire, c).run()
}

// Close disconnects every device and waits until nothing runs for any of them.
func (b *Broker) Close() {
	b.close()
	if b.listener != nil {
		_ = b.listener.Close()
	}
	b.work.Wait()
}

// admit makes a session the one of its thing. An older one is ended first
// [MQTT-3.1.4-3], its Last Will included, so that nothing of it comes later.
func (b *Broker) admit(s *session) {
	for {
		b.mu.Lock()
		older := b.sessions[s.thing]
		if older == nil {
			b.sessions[s.thing] = s
			b.mu.Unlock()
			return
		}
		b.mu.Unlock()
		older.stop(packets.ErrSessionTakenOver)
		<-older.ended
	}
}

// dismiss forgets a session that has ended.
func (b *Broker) dismiss(s *session) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sessions[s.thing] == s {
		delete(b.sessions, s.thing)
	}
}

func (b *Broker) session(thing string) *session {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sessions[thing]
}

// thingOf is the thing that a shadow topic belongs to.
func thingOf(topic string) string {
	parts := strings.SplitN(topic, "/", 4)
	if len(parts) < 4 {
		return ""
	}
	return parts[2]
}

// Publish implements shadow.Bus.
func (b *Broker) Publish(topic string, payload []byte) {
	s := b.session(thingOf(topic))
	if s == nil {
		return
	}
	if qos, ids, ok := s.subscribed(topic); ok {
		s.out.add(&message{topic: topic, payload: payload, qos: qos, ids: ids})
	}
}

// Present implements shadow.Bus: a session counts once it has subscribed to its
// delta with QoS 1.
func (b *Broker) Present(thing string) bool {
	s := b.session(thing)
	if s == nil {
		return false
	}
	qos, _, ok := s.subscribed(shadow.Address{Thing: thing}.Topic("update/delta"))
	return ok && qos == 1
}

// Command implements shadow.Bus.
func (b *Broker) Command(thing, topic string, payload []byte, until clock.Deadline, acked func()) error {
	s := b.session(thing)
	if s == nil {
		return shadow.ErrOffline
	}
	qos, ids, ok := s.subscribed(topic)
	if !ok || qos < 1 || !s.out.add(&message{topic: topic, payload: payload, qos: 1, ids: ids, until: &until, acked: acked}) {
		return shadow.ErrOffline
	}
	return nil
}
