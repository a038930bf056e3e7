// Package broker is the embedded MQTT broker. Devices connect with TLS and a
// client certificate; certificate, client id and thing are the same name, and a
// device may publish, subscribe and leave a Last Will only under that name.
//
// It is the shadow service's Bus and no general message broker: what a device
// publishes goes to the shadow service and to nobody else. Sessions are always
// clean, so that nothing waits for a device that comes back.
package broker

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"strings"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/shadow"
)

// Handler takes a shadow request from a thing's own authenticated connection.
// The request is acknowledged to the device when it returns.
type Handler func(ctx context.Context, thing string, a shadow.Address, op shadow.Operation, payload []byte)

// Limits of a connection.
const (
	packetMost    = 64 << 10 // bytes
	queuedMost    = 256      // messages waiting for a slow device
	inflightMost  = 128      // messages unacknowledged
	keepaliveMost = 1200     // seconds, as AWS IoT
)

// Broker is the embedded broker.
type Broker struct {
	server *mqtt.Server
	local  *mqtt.Client // publishes for the server
	hook   *hook
	tls    *tls.Config
	clock  clock.Clock
	log    *slog.Logger
}

// New makes a broker that nobody can reach before Serve.
func New(cert tls.Certificate, ca *CA, c clock.Clock, log *slog.Logger) (*Broker, error) {
	caps := mqtt.NewDefaultServerCapabilities()
	caps.MaximumQos = 1
	caps.RetainAvailable, caps.SharedSubAvailable = 0, 0
	caps.MaximumSessionExpiryInterval = 0
	caps.MaximumClientWritesPending = queuedMost
	caps.MaximumInflight, caps.ReceiveMaximum = inflightMost, inflightMost
	caps.MaximumPacketSize = packetMost
	caps.MinimumProtocolVersion = 4 // MQTT 3.1.1
	b := &Broker{
		server: mqtt.New(&mqtt.Options{Capabilities: caps, Logger: slog.New(discreet{log.Handler()})}),
		hook:   &hook{log: log},
		tls: &tls.Config{
			Certificates: []tls.Certificate{cert},
			ClientAuth:   tls.RequireAndVerifyClientCert,
			ClientCAs:    ca.Pool(),
			MinVersion:   tls.VersionTLS12,
			NextProtos:   []string{"x-amzn-mqtt-ca", "mqtt"},
		},
		clock: c,
		log:   log,
	}
	b.local = b.server.NewClient(nil, "local", "openlock", true)
	b.local.Properties.ProtocolVersion = 5 // or message expiry is not passed on
	return b, b.server.AddHook(b.hook, nil)
}

// Serve takes devices on a socket from now on, and gives their requests to h.
func (b *Broker) Serve(tcp *net.TCPListener, h Handler) error {
	b.hook.handle = h
	if err := b.server.AddListener(newListener(tcp, b.tls, b.clock, b.log)); err != nil {
		return err
	}
	return b.server.Serve()
}

// Close disconnects every device and waits for their connections to end.
func (b *Broker) Close() error { return b.server.Close() }

// Publish implements shadow.Bus.
func (b *Broker) Publish(topic string, payload []byte) {
	if err := b.publish(topic, payload, 0); err != nil {
		b.hook.log.Error("publish to a device", "topic", topic, "error", err)
	}
}

func (b *Broker) publish(topic string, payload []byte, expiry time.Duration) error {
	return b.server.InjectPacket(b.local, packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Publish, Qos: 1},
		TopicName:   topic,
		Payload:     payload,
		PacketID:    1, // required with QoS 1; nothing comes back
		Properties:  packets.Properties{MessageExpiryInterval: seconds(expiry)},
	})
}

// seconds rounds up, since 0 is no expiry at all.
func seconds(d time.Duration) uint32 { return uint32((d + time.Second - 1) / time.Second) }

// Present implements shadow.Bus: a session counts once it has subscribed to its
// delta with QoS 1.
func (b *Broker) Present(thing string) bool {
	return b.session(thing, shadow.Address{Thing: thing}.Topic("update/delta")) != nil
}

// session finds a thing's live connection if it would receive a topic with QoS 1.
func (b *Broker) session(thing, topic string) *conn {
	cl, ok := b.server.Clients.Get(thing)
	if !ok || cl.Closed() {
		return nil
	}
	for filter, sub := range cl.State.Subscriptions.GetAll() {
		if sub.Qos >= 1 && matches(filter, topic) {
			return connOf(cl)
		}
	}
	return nil
}

// Command implements shadow.Bus.
func (b *Broker) Command(thing, topic string, payload []byte, until clock.Deadline, acked func()) error {
	c := b.session(thing, topic)
	if c == nil {
		return shadow.ErrOffline
	}
	d := &delivery{until: until, acked: acked}
	c.arm(d)
	err := b.publish(topic, payload, c.clock.Left(until))
	if !c.disarm(d) || err != nil {
		return shadow.ErrOffline
	}
	return nil
}

// matches applies MQTT's wildcards [MQTT-4.7.1]. The ACL has seen to it that
// they stand behind the thing's own name.
func matches(filter, topic string) bool {
	f, t := strings.Split(filter, "/"), strings.Split(topic, "/")
	for i, level := range f {
		switch {
		case level == "#":
			return true
		case i >= len(t) || level != "+" && level != t[i]:
			return false
		}
	}
	return len(f) == len(t)
}
