package broker

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/shadow"
)

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// bench is a broker with a real authority, on a real socket.
type bench struct {
	*Broker
	t        *testing.T
	ca       *CA
	addr     string
	requests chan request // as the handler gets them
	handle   func(request)
	log      *logBuffer

	revokedSerials map[string]bool // guarded by the broker's mutex
}

type request struct {
	thing, topic, payload string
}

func newBench(t *testing.T, c clock.Clock) *bench {
	t.Helper()
	b := &bench{t: t, ca: newCA(t), requests: make(chan request, 10_000), log: &logBuffer{}, revokedSerials: map[string]bool{}}
	b.handle = func(r request) { b.requests <- r }
	cert, err := b.ca.Server()
	check(t, err)
	b.Broker = New(cert, b.ca, b.revokedNow, c, slog.New(slog.NewTextHandler(b.log, nil)))
	tcp, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	check(t, err)
	b.addr = tcp.Addr().String()
	b.Serve(tcp, func(_ context.Context, thing string, a shadow.Address, op shadow.Operation, payload []byte) {
		b.handle(request{thing, a.Topic(string(op)), string(payload)})
	})
	t.Cleanup(b.Close)
	return b
}

func newCA(t *testing.T) *CA {
	t.Helper()
	ca, err := OpenCA(filepath.Join(t.TempDir(), "pki"))
	check(t, err)
	return ca
}

// enrolled is a device's identity as its maker gets it.
func (ca *CA) enrolled(t *testing.T, thing string) tls.Certificate {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "device")
	_, err := ca.Enroll(thing, dir)
	check(t, err)
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "device.crt"), filepath.Join(dir, "device.key"))
	check(t, err)
	return pair
}

// issued is a certificate as Enroll would never make it.
func (ca *CA) issued(t *testing.T, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	c := &x509.Certificate{
		Subject: pkix.Name{CommonName: "T"}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	change(c)
	cert, err := ca.sign(c, &key.PublicKey)
	check(t, err)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

// revoke makes a certificate invalid.
func (b *bench) revoke(c tls.Certificate) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.revokedSerials[Serial(c.Leaf)] = true
}

func (b *bench) revokedNow(context.Context) (map[string]bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.revokedSerials), nil
}

// nextRequest is what the handler got.
func (b *bench) nextRequest() request {
	b.t.Helper()
	select {
	case r := <-b.requests:
		return r
	case <-time.After(patience):
		b.t.Fatal("no request reached the handler")
		return request{}
	}
}

func (b *bench) wantRequest(want request) {
	b.t.Helper()
	if got := b.nextRequest(); got != want {
		b.t.Fatalf("handler got %+v, want %+v", got, want)
	}
}

// gone is closed when nothing runs any more for the connection that a thing has
// now.
func (b *bench) gone(thing string) <-chan struct{} {
	b.t.Helper()
	s := b.session(thing)
	if s == nil {
		b.t.Fatalf("%s is not connected", thing)
	}
	return s.ended
}

func await(t *testing.T, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("not within %s: %s", patience, what)
	}
}

// device is an MQTT client, packet by packet.
type device struct {
	t       *testing.T
	thing   string
	version byte // 4 is MQTT 3.1.1
	conn    *tls.Conn
	r       *bufio.Reader
}

// dial connects with TLS and says nothing yet.
func (b *bench) dial(cert ...tls.Certificate) *device {
	b.t.Helper()
	var d net.Dialer
	return b.over(&d, b.addr, cert...)
}

func (b *bench) over(d *net.Dialer, addr string, cert ...tls.Certificate) *device {
	b.t.Helper()
	tcp, err := d.Dial("tcp", addr)
	check(b.t, err)
	b.t.Cleanup(func() { _ = tcp.Close() })
	c := tls.Client(tcp, &tls.Config{RootCAs: b.ca.Pool(), ServerName: "localhost", Certificates: cert, MinVersion: tls.VersionTLS12})
	check(b.t, c.Handshake())
	return &device{t: b.t, version: 5, conn: c, r: bufio.NewReader(c)}
}

// connect is a device with a session.
func (b *bench) connect(thing string, change ...func(*packets.Packet)) *device {
	b.t.Helper()
	return b.dial(b.ca.enrolled(b.t, thing)).connect(thing, change...)
}

func connectPacket(thing string) packets.Packet {
	return packets.Packet{
		ProtocolVersion: 5,
		FixedHeader:     packets.FixedHeader{Type: packets.Connect},
		Connect:         packets.ConnectParams{ProtocolName: []byte("MQTT"), Clean: true, Keepalive: 60, ClientIdentifier: thing},
	}
}

func v311(pk *packets.Packet) { pk.ProtocolVersion = 4 }

func (d *device) connect(thing string, change ...func(*packets.Packet)) *device {
	d.t.Helper()
	if ack := d.hello(thing, change...); ack.ReasonCode != 0 {
		d.t.Fatalf("CONNACK for %s: reason %#x", thing, ack.ReasonCode)
	}
	return d
}

// hello sends CONNECT and answers with CONNACK.
func (d *device) hello(thing string, change ...func(*packets.Packet)) packets.Packet {
	d.t.Helper()
	pk := connectPacket(thing)
	for _, c := range change {
		c(&pk)
	}
	d.thing, d.version = thing, pk.ProtocolVersion
	d.send(pk)
	return d.want(packets.Connack)
}

// write sends a packet if it still can.
func (d *device) write(pk packets.Packet) error {
	if pk.ProtocolVersion == 0 {
		pk.ProtocolVersion = d.version
	}
	var buf bytes.Buffer
	encode := map[byte]func(*packets.Packet, *bytes.Buffer) error{
		packets.Connect: (*packets.Packet).ConnectEncode, packets.Publish: (*packets.Packet).PublishEncode,
		packets.Puback: (*packets.Packet).PubackEncode, packets.Subscribe: (*packets.Packet).SubscribeEncode,
		packets.Unsubscribe: (*packets.Packet).UnsubscribeEncode,
		packets.Pingreq:     (*packets.Packet).PingreqEncode, packets.Disconnect: (*packets.Packet).DisconnectEncode,
	}[pk.FixedHeader.Type]
	check(d.t, encode(&pk, &buf))
	_, err := d.conn.Write(buf.Bytes())
	return err
}

func (d *device) send(pk packets.Packet) {
	d.t.Helper()
	check(d.t, d.write(pk))
}

// read answers with the next packet.
func (d *device) read() (packets.Packet, error) {
	_ = d.conn.SetReadDeadline(time.Now().Add(patience))
	pk := packets.Packet{ProtocolVersion: d.version}
	first, err := d.r.ReadByte()
	if err != nil {
		return pk, err
	}
	if err := pk.FixedHeader.Decode(first); err != nil {
		return pk, err
	}
	if pk.FixedHeader.Remaining, _, err = packets.DecodeLength(d.r); err != nil {
		return pk, err
	}
	body := make([]byte, pk.FixedHeader.Remaining)
	if _, err := io.ReadFull(d.r, body); err != nil {
		return pk, err
	}
	decode := map[byte]func(*packets.Packet, []byte) error{
		packets.Connack: (*packets.Packet).ConnackDecode, packets.Publish: (*packets.Packet).PublishDecode,
		packets.Puback: (*packets.Packet).PubackDecode, packets.Suback: (*packets.Packet).SubackDecode,
		packets.Unsuback:   (*packets.Packet).UnsubackDecode,
		packets.Disconnect: (*packets.Packet).DisconnectDecode, packets.Pingresp: (*packets.Packet).PingrespDecode,
	}[pk.FixedHeader.Type]
	if decode == nil {
		return pk, fmt.Errorf("unexpected packet type %d", pk.FixedHeader.Type)
	}
	return pk, decode(&pk, body)
}

// want reads a packet, which must be of a type.
func (d *device) want(kind byte) packets.Packet {
	d.t.Helper()
	pk, err := d.read()
	if err != nil {
		d.t.Fatalf("%s reads: %v, want packet type %d", d.thing, err, kind)
	}
	if pk.FixedHeader.Type != kind {
		d.t.Fatalf("%s got packet type %d, want %d: %s %s", d.thing, pk.FixedHeader.Type, kind, pk.TopicName, pk.Payload)
	}
	return pk
}

// wantMessage reads a message and does not acknowledge it.
func (d *device) wantMessage(payload string) packets.Packet {
	d.t.Helper()
	pk := d.want(packets.Publish)
	if string(pk.Payload) != payload {
		d.t.Fatalf("%s got message %.100q, want %q", d.thing, pk.Payload, payload)
	}
	return pk
}

// wantEnd reads until the connection ends, and answers with how it did.
func (d *device) wantEnd() error {
	d.t.Helper()
	for {
		_, err := d.read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			d.t.Fatalf("the connection of %s is still open", d.thing)
		}
		if err != nil {
			return err
		}
	}
}

// topic is one below the device's own shadow.
func (d *device) topic(suffix string) string { return shadow.Address{Thing: d.thing}.Topic(suffix) }

func (d *device) publish(topic, payload string, qos byte) {
	d.t.Helper()
	d.send(publishPacket(topic, payload, qos))
}

func publishPacket(topic, payload string, qos byte) packets.Packet {
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: qos}, TopicName: topic, Payload: []byte(payload),
	}
	if qos > 0 {
		pk.PacketID = 7
	}
	return pk
}

// subscribe answers with the granted QoS or the refusal.
func (d *device) subscribe(filter string, qos byte) byte {
	d.t.Helper()
	d.send(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 60_000,
		Filters: packets.Subscriptions{{Filter: filter, Qos: qos}},
	})
	return d.want(packets.Suback).ReasonCodes[0]
}

// listen subscribes to everything of its own with QoS 1.
func (d *device) listen() *device {
	d.t.Helper()
	if code := d.subscribe(d.topic("#"), 1); code != 1 {
		d.t.Fatalf("SUBACK %#x, want QoS 1", code)
	}
	return d
}

func (d *device) ack(id uint16) {
	d.t.Helper()
	d.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Puback}, PacketID: id})
}

// ping goes there and back: what was sent before it has been dealt with.
func (d *device) ping() {
	d.t.Helper()
	d.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})
	d.want(packets.Pingresp)
}

// settableClock is a clock that stands still until it is moved.
type settableClock struct {
	mu           sync.Mutex
	wall, steady time.Time
}

func newSettableClock() *settableClock {
	now := time.Now().UTC()
	return &settableClock{wall: now, steady: now}
}

func (s *settableClock) clock() clock.Clock {
	get := func(p *time.Time) func() time.Time {
		return func() time.Time {
			s.mu.Lock()
			defer s.mu.Unlock()
			return *p
		}
	}
	return clock.Clock{Wall: get(&s.wall), Steady: get(&s.steady)}
}

func (s *settableClock) step(wall, steady time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wall, s.steady = s.wall.Add(wall), s.steady.Add(steady)
}

// logBuffer keeps what the broker logs.
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

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// system is the machine's clock.
var system, _ = clock.System(clock.Anchor{})
