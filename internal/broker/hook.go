package broker

import (
	"context"
	"crypto/tls"
	"log/slog"
	"strings"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/openlock/openlock/internal/shadow"
)

// hook is where the broker library asks what is allowed and tells what happens.
type hook struct {
	mqtt.HookBase
	log    *slog.Logger
	handle Handler
}

// ID implements mqtt.Hook.
func (h *hook) ID() string { return "openlock" }

// Provides implements mqtt.Hook.
func (h *hook) Provides(b byte) bool {
	switch b {
	case mqtt.OnPacketRead, mqtt.OnConnect, mqtt.OnConnectAuthenticate, mqtt.OnACLCheck, mqtt.OnPublish, mqtt.OnWill,
		mqtt.OnQosPublish, mqtt.OnQosComplete, mqtt.OnPublishDropped, mqtt.OnSessionEstablished, mqtt.OnDisconnect:
		return true
	}
	return false
}

// OnPacketRead makes every session clean: nothing may wait for a device that
// comes back. QoS 2 is not offered [MQTT-3.2.2-11].
func (h *hook) OnPacketRead(_ *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	switch {
	case pk.FixedHeader.Type == packets.Connect:
		pk.Connect.Clean = true
	case pk.FixedHeader.Type == packets.Publish && pk.FixedHeader.Qos > 1:
		return pk, packets.ErrQosNotSupported
	}
	return pk, nil
}

// OnConnect bounds the keep-alive, so that a device that has vanished is noticed.
func (h *hook) OnConnect(cl *mqtt.Client, _ packets.Packet) error {
	if cl.State.Keepalive == 0 || cl.State.Keepalive > keepaliveMost {
		cl.State.Keepalive, cl.State.ServerKeepalive = keepaliveMost, true
	}
	return nil
}

// OnConnectAuthenticate lets a device in under the name in its certificate. Its
// Last Will is checked here, since the library publishes it past the ACL.
func (h *hook) OnConnectAuthenticate(cl *mqtt.Client, pk packets.Packet) bool {
	name := certName(cl)
	switch {
	case name == "" || cl.ID != name || !shadow.ValidThing(name):
		h.log.Warn("device refused: its client id must be the name in its certificate",
			"certificate", name, "client", cl.ID, "remote", cl.Net.Remote)
		return false
	case pk.Connect.WillFlag && !mayPublish(cl.ID, pk.Connect.WillTopic):
		h.log.Warn("device refused: its Last Will is not a shadow request of its own",
			"client", cl.ID, "topic", pk.Connect.WillTopic)
		return false
	}
	return true
}

// OnACLCheck implements mqtt.Hook, for publishing, subscribing and delivery.
func (h *hook) OnACLCheck(cl *mqtt.Client, topic string, write bool) bool {
	if write {
		return mayPublish(cl.ID, topic)
	}
	return strings.HasPrefix(topic, shadow.Address{Thing: cl.ID}.Prefix()+"/")
}

// mayPublish allows a thing its own shadow requests and nothing else.
func mayPublish(thing, topic string) bool {
	a, _, ok := shadow.ParseTopic(topic)
	return ok && a.Thing == thing
}

// OnPublish takes a device's request to the shadow service, and nowhere else.
func (h *hook) OnPublish(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	if cl.Net.Inline {
		return pk, nil
	}
	h.request(cl.ID, pk.TopicName, pk.Payload)
	return pk, packets.CodeSuccessIgnore
}

// OnWill takes a Last Will to the shadow service too. The library then
// publishes it, under a topic that nobody may subscribe to.
func (h *hook) OnWill(cl *mqtt.Client, w mqtt.Will) (mqtt.Will, error) {
	h.request(cl.ID, w.TopicName, w.Payload)
	return w, nil
}

func (h *hook) request(thing, topic string, payload []byte) {
	if a, op, ok := shadow.ParseTopic(topic); ok && a.Thing == thing {
		h.handle(context.Background(), thing, a, op, payload)
	}
}

// OnQosPublish implements mqtt.Hook: a packet has its id and is not yet queued.
func (h *hook) OnQosPublish(cl *mqtt.Client, pk packets.Packet, _ int64, _ int) {
	if c := connOf(cl); c != nil && pk.FixedHeader.Type == packets.Publish {
		c.queue(pk.PacketID)
	}
}

// OnQosComplete implements mqtt.Hook.
func (h *hook) OnQosComplete(cl *mqtt.Client, pk packets.Packet) {
	if c := connOf(cl); c != nil && pk.FixedHeader.Type == packets.Puback {
		c.ack(pk.PacketID)
	}
}

// OnPublishDropped implements mqtt.Hook: a device is too slow for its queue.
func (h *hook) OnPublishDropped(cl *mqtt.Client, pk packets.Packet) {
	if c := connOf(cl); c != nil {
		c.drop()
	}
	h.log.Warn("a device does not keep up, a message to it was dropped", "client", cl.ID, "topic", pk.TopicName)
}

// OnSessionEstablished implements mqtt.Hook.
func (h *hook) OnSessionEstablished(cl *mqtt.Client, _ packets.Packet) {
	h.log.Info("device connected", "client", cl.ID, "remote", cl.Net.Remote)
}

// OnDisconnect implements mqtt.Hook.
func (h *hook) OnDisconnect(cl *mqtt.Client, err error, _ bool) {
	h.log.Info("device disconnected", "client", cl.ID, "remote", cl.Net.Remote, "cause", err)
}

// connOf finds our connection below the client's TLS.
func connOf(cl *mqtt.Client) *conn {
	if t, ok := cl.Net.Conn.(*tls.Conn); ok {
		c, _ := t.NetConn().(*conn)
		return c
	}
	return nil
}

func certName(cl *mqtt.Client) string {
	t, ok := cl.Net.Conn.(*tls.Conn)
	if !ok || len(t.ConnectionState().PeerCertificates) == 0 {
		return ""
	}
	return t.ConnectionState().PeerCertificates[0].Subject.CommonName
}

// discreet is the library's way to our log: its warnings, without the packets
// it would print.
type discreet struct{ slog.Handler }

// Enabled implements slog.Handler.
func (d discreet) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && d.Handler.Enabled(ctx, l)
}

// Handle implements slog.Handler.
func (d discreet) Handle(ctx context.Context, r slog.Record) error {
	clean := slog.NewRecord(r.Time, r.Level, r.Message, r.PC)
	r.Attrs(func(a slog.Attr) bool {
		if a.Key != "pk" && a.Key != "packet" {
			clean.AddAttrs(a)
		}
		return true
	})
	return d.Handler.Handle(ctx, clean)
}

// WithAttrs implements slog.Handler.
func (d discreet) WithAttrs(a []slog.Attr) slog.Handler { return discreet{d.Handler.WithAttrs(a)} }

// WithGroup implements slog.Handler.
func (d discreet) WithGroup(name string) slog.Handler { return discreet{d.Handler.WithGroup(name)} }
