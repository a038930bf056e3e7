package broker

import (
	"bytes"
	"io"
	"sync"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/openlock/openlock/internal/clock"
)

const (
	queuedMost   = 256 // messages waiting for a slow device
	inflightMost = 128 // messages sent and not acknowledged
	// lookEvery is how soon a wall clock that was stepped past a command's
	// deadline is noticed.
	lookEvery = time.Second
)

// message is a PUBLISH on its way to a device.
type message struct {
	topic   string
	payload []byte
	qos     byte
	ids     []int           // subscription identifiers [MQTT-3.3.4-3]
	until   *clock.Deadline // nil: it may arrive at any time
	acked   func()          // nil: nobody wants to know
}

// outbox is what a session sends. Whoever adds to it does not wait; a goroutine
// runs while there is something to write.
//
// A message with a deadline is not written once that has passed, and when it
// was written and is not acknowledged by then, the connection is reset.
type outbox struct {
	wire    *wire
	tls     io.Writer
	version byte
	largest uint32 // packet that the device takes, 0: any
	quota   int    // messages that the device takes unacknowledged

	mu      sync.Mutex
	answers []packets.Packet // acknowledgements and the like, which go first
	waiting []*message
	unacked map[uint16]*message
	lastID  uint16
	writing bool
	closed  bool
	idle    sync.Cond // nobody writes
}

func newOutbox(w *wire, tls io.Writer) *outbox {
	o := &outbox{wire: w, tls: tls, unacked: map[uint16]*message{}, quota: inflightMost}
	o.idle.L = &o.mu
	return o
}

// add queues a message. It says whether it did: not when the device does not
// keep up, or takes no packet as large, or the session has ended.
func (o *outbox) add(m *message) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || len(o.waiting) >= queuedMost || o.largest > 0 && o.size(m) > o.largest {
		return false
	}
	o.waiting = append(o.waiting, m)
	o.wake()
	return true
}

// answer queues a packet that answers one of the device's. A device that sends
// and does not read is cut off.
func (o *outbox) answer(pk packets.Packet) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.answers) >= queuedMost {
		o.shut()
		o.wire.reset()
		return
	}
	o.answers = append(o.answers, pk)
	o.wake()
}

// wake starts the writer if there is something that may be written.
func (o *outbox) wake() {
	if !o.writing && !o.closed && (len(o.answers) > 0 || o.sendable()) {
		o.writing = true
		go o.write()
	}
}

func (o *outbox) sendable() bool {
	return len(o.waiting) > 0 && (o.waiting[0].qos == 0 || len(o.unacked) < o.quota)
}

// write writes until nothing is left that may be written.
func (o *outbox) write() {
	for {
		pk, until, ok := o.next()
		if !ok {
			return
		}
		var buf bytes.Buffer
		err := encode(pk, &buf)
		if err == nil {
			o.wire.until.Store(until)
			_, err = o.tls.Write(buf.Bytes())
		}
		if err != nil {
			o.fail()
			return
		}
	}
}

// next takes the next packet out. A command whose time is over is left out: it
// was never written.
func (o *outbox) next() (pk packets.Packet, until *clock.Deadline, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for !o.closed {
		if len(o.answers) > 0 {
			pk, o.answers = o.answers[0], o.answers[1:]
			return pk, o.earliest(), true
		}
		if !o.sendable() {
			break
		}
		m := o.waiting[0]
		o.waiting = o.waiting[1:]
		if m.until == nil || !o.wire.clock.Passed(*m.until) {
			return o.publish(m), o.earliest(), true
		}
	}
	o.writing = false
	o.idle.Broadcast()
	return pk, nil, false
}

// publish makes a message a packet. With QoS 1 it is unacknowledged from here
// on, before any byte of it is written.
func (o *outbox) publish(m *message) packets.Packet {
	pk := o.packet(m)
	if m.qos == 0 {
		return pk
	}
	for {
		o.lastID++
		if _, taken := o.unacked[o.lastID]; o.lastID != 0 && !taken {
			break
		}
	}
	pk.PacketID = o.lastID
	o.unacked[pk.PacketID] = m
	if m.until != nil {
		o.watch(pk.PacketID, m)
	}
	return pk
}

func (o *outbox) packet(m *message) packets.Packet {
	pk := packets.Packet{
		FixedHeader:     packets.FixedHeader{Type: packets.Publish, Qos: m.qos},
		ProtocolVersion: o.version,
		TopicName:       m.topic, Payload: m.payload, PacketID: 1,
		Properties: packets.Properties{SubscriptionIdentifier: m.ids},
	}
	if m.until != nil { // rounded up, since 0 is no expiry at all [MQTT-3.3.2-5]
		left := max(1, (o.wire.clock.Left(*m.until)+time.Second-1)/time.Second)
		pk.Properties.MessageExpiryInterval = uint32(left)
	}
	return pk
}

// size is how large a message's packet is.
func (o *outbox) size(m *message) uint32 {
	var buf bytes.Buffer
	_ = encode(o.packet(m), &buf)
	return uint32(buf.Len())
}

// earliest is the first deadline of what the connection holds. After it nothing
// may be written: TCP delivers in order or not at all.
func (o *outbox) earliest() (first *clock.Deadline) {
	for _, m := range o.unacked {
		if m.until != nil && (first == nil || m.until.Steady.Before(first.Steady)) {
			first = m.until
		}
	}
	return first
}

// watch resets the connection when a command in it is not acknowledged in time.
func (o *outbox) watch(id uint16, m *message) {
	time.AfterFunc(min(lookEvery, max(0, o.wire.clock.Left(*m.until))), func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		switch {
		case o.closed || o.unacked[id] != m:
		case o.wire.clock.Passed(*m.until):
			o.shut()
			o.wire.reset()
		default:
			o.watch(id, m)
		}
	})
}

// ack notes that the device has a message [MQTT-4.3.2-3].
func (o *outbox) ack(id uint16) {
	o.mu.Lock()
	m := o.unacked[id]
	delete(o.unacked, id)
	o.wake()
	o.mu.Unlock()
	if m != nil && m.acked != nil {
		m.acked()
	}
}

// fail ends the connection after a write has failed, part of it perhaps done.
func (o *outbox) fail() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.writing = false
	o.shut()
	o.wire.reset()
	o.idle.Broadcast()
}

// shut takes nothing more and forgets what waits.
func (o *outbox) shut() {
	o.closed = true
	o.answers, o.waiting = nil, nil
}

// end closes the connection, after a last packet if there is one to send. While
// it holds a command that is not acknowledged, it is reset instead.
func (o *outbox) end(last *packets.Packet) {
	o.mu.Lock()
	defer o.mu.Unlock()
	holds := o.earliest() != nil
	if last != nil && !o.closed && !holds {
		o.waiting = nil
		o.answers = append(o.answers, *last)
		o.wake()
		for o.writing {
			o.idle.Wait()
		}
	}
	o.shut()
	if holds {
		o.wire.reset()
	} else {
		_ = o.wire.Close()
	}
}

// encode writes the packets that a server sends.
func encode(pk packets.Packet, buf *bytes.Buffer) error {
	switch pk.FixedHeader.Type {
	case packets.Connack:
		return pk.ConnackEncode(buf)
	case packets.Publish:
		return pk.PublishEncode(buf)
	case packets.Puback:
		return pk.PubackEncode(buf)
	case packets.Suback:
		return pk.SubackEncode(buf)
	case packets.Unsuback:
		return pk.UnsubackEncode(buf)
	case packets.Pingresp:
		return pk.PingrespEncode(buf)
	default:
		return pk.DisconnectEncode(buf)
	}
}
