package broker

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/openlock/openlock/internal/clock"
	"github.com/openlock/openlock/internal/shadow"
)

const delta = "$aws/things/T/shadow/update/delta"

// command sends one to T, and answers with how often it was acknowledged.
func (b *bench) command(payload string, until clock.Deadline) *atomic.Int32 {
	b.t.Helper()
	var acked atomic.Int32
	check(b.t, b.Command("T", delta, []byte(payload), until, func() { acked.Add(1) }))
	return &acked
}

// wantReset reads no more messages, and a reset at the end.
func (d *device) wantReset() {
	d.t.Helper()
	if err := d.wantSilentEnd(); !errors.Is(err, syscall.ECONNRESET) {
		d.t.Errorf("the connection ended with %v, want a reset", err)
	}
}

func (d *device) wantSilentEnd() error {
	d.t.Helper()
	pk, err := d.read()
	if err == nil {
		d.t.Fatalf("%s got packet type %d after the deadline: %.100s", d.thing, pk.FixedHeader.Type, pk.Payload)
	}
	if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
		d.t.Fatalf("the connection of %s is still open", d.thing)
	}
	return err
}

// Way of one open, 2: QoS 1, never retained, with a message expiry where the
// device speaks it, rounded up since 0 is none.
func TestCommandOnTheWire(t *testing.T) {
	for _, version := range []byte{4, 5} {
		for life, expiry := range map[time.Duration]uint32{10 * time.Second: 10, 9100 * time.Millisecond: 10, time.Millisecond: 1} {
			t.Run(fmt.Sprint(version, life), func(t *testing.T) {
				s := newSettableClock()
				b := newBench(t, s.clock())
				d := b.connect("T", func(pk *packets.Packet) { pk.ProtocolVersion = version }).listen()
				acked := b.command("command", s.clock().In(life))
				pk := d.wantMessage("command")
				if pk.FixedHeader.Qos != 1 || pk.FixedHeader.Retain || pk.FixedHeader.Dup {
					t.Errorf("%+v", pk.FixedHeader)
				}
				if version == 5 && pk.Properties.MessageExpiryInterval != expiry {
					t.Errorf("message expiry %d, want %d", pk.Properties.MessageExpiryInterval, expiry)
				}
				d.ping()
				if acked.Load() != 0 {
					t.Error("acknowledged before PUBACK")
				}
				d.ack(pk.PacketID)
				d.ack(pk.PacketID)
				d.ping()
				if acked.Load() != 1 {
					t.Errorf("acknowledged %d times after PUBACK", acked.Load())
				}
				s.step(time.Hour, time.Hour)
				d.ping() // what was acknowledged has no deadline any more
			})
		}
	}
}

// Bus: Command refuses with ErrOffline when nothing was or will be sent.
func TestCommandToNobody(t *testing.T) {
	b := newBench(t, system)
	until := system.In(time.Hour)
	if err := b.Command("T", delta, []byte("command"), until, nil); !errors.Is(err, shadow.ErrOffline) {
		t.Errorf("never connected: %v", err)
	}
	d := b.connect("T")
	if err := b.Command("T", delta, []byte("command"), until, nil); !errors.Is(err, shadow.ErrOffline) {
		t.Errorf("not subscribed: %v", err)
	}
	d.listen()
	const room = inflightMost + queuedMost // it acknowledges nothing, and so has no room for more
	for i := range inflightMost {
		b.Publish(d.topic("get/accepted"), fmt.Append(nil, i))
	}
	for i := range inflightMost {
		d.wantMessage(fmt.Sprint(i))
	}
	for i := inflightMost; i < room; i++ {
		b.Publish(d.topic("get/accepted"), fmt.Append(nil, i))
	}
	if err := b.Command("T", delta, []byte("command"), until, nil); !errors.Is(err, shadow.ErrOffline) {
		t.Errorf("no room: %v", err)
	}
	for id := range uint16(inflightMost) {
		d.ack(id + 1)
	}
	for i := inflightMost; i < room; i++ {
		d.ack(d.wantMessage(fmt.Sprint(i)).PacketID)
	}
	d.ping()
}

// Expiry: a connection that has not acknowledged by the deadline is reset, with
// nothing after the command.
func TestUnacknowledgedCommandResetsTheConnection(t *testing.T) {
	c := system
	b := newBench(t, c)
	d := b.connect("T").listen()
	until := c.In(300 * time.Millisecond)
	acked := b.command("command", until)
	d.wantMessage("command")
	d.wantReset()
	if left := c.Left(until); left > 0 || left < -2*time.Second {
		t.Errorf("reset %s before the deadline", left)
	}
	if acked.Load() != 0 {
		t.Error("it counts as acknowledged")
	}
}

// The deadline is wall clock or monotonic clock, whichever comes first, and it
// is looked at again when a clock says that it is not yet.
func TestDeadlineByEitherClock(t *testing.T) {
	t.Parallel()
	for name, step := range map[string]func(*settableClock){
		"wall":   func(s *settableClock) { s.step(time.Minute, 0) },
		"steady": func(s *settableClock) { s.step(-time.Hour, time.Minute) },
	} {
		for _, life := range []time.Duration{50 * time.Millisecond, time.Minute} {
			t.Run(fmt.Sprint(name, life), func(t *testing.T) {
				t.Parallel()
				s := newSettableClock()
				b := newBench(t, s.clock())
				d := b.connect("T").listen()
				b.command("command", s.clock().In(life))
				d.wantMessage("command")
				if life < time.Second {
					<-time.After(2 * life) // the broker has looked, and found both clocks slow
				}
				d.ping()
				step(s)
				d.wantReset()
			})
		}
	}
}

// What was acknowledged has no deadline any more.
func TestAcknowledgedCommandEndsNothing(t *testing.T) {
	s := newSettableClock()
	b := newBench(t, s.clock())
	d := b.connect("T").listen()
	const life = 50 * time.Millisecond
	b.command("command", s.clock().In(life))
	d.ack(d.wantMessage("command").PacketID)
	d.ping()
	s.step(time.Hour, time.Hour)
	<-time.After(2 * life) // the broker has looked
	d.ping()
}

// Expiry: checked at the socket write. The process is paused after the command
// was queued: here it waits for the device's Receive Maximum, and the clock is
// stepped before the device makes room.
func TestPauseBetweenQueueAndWrite(t *testing.T) {
	s := newSettableClock()
	b := newBench(t, s.clock())
	d := b.connect("T", receiveMaximum(1)).listen()
	b.Publish(d.topic("get/accepted"), []byte("first"))
	first := d.wantMessage("first")
	acked := b.command("command", s.clock().In(time.Hour))
	d.ping()
	s.step(time.Hour, 0)
	b.Publish(d.topic("get/accepted"), []byte("marker"))
	d.ack(first.PacketID)
	d.wantMessage("marker") // the command was never written
	if acked.Load() != 0 {
		t.Error("it counts as acknowledged")
	}
}

// Expiry: nothing is written after a command whose time is over, not even before
// somebody has looked at the clock.
func TestNothingIsWrittenAfterTheDeadline(t *testing.T) {
	s := newSettableClock()
	b := newBench(t, s.clock())
	d := b.connect("T").listen()
	b.command("command", s.clock().In(time.Hour))
	d.wantMessage("command")
	s.step(0, time.Hour)
	d.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})
	d.wantReset()
}

func receiveMaximum(n uint16) func(*packets.Packet) {
	return func(pk *packets.Packet) { pk.Properties.ReceiveMaximum = n }
}

// A command that was held is as good as any once there is room: it expires when
// it should, and is acknowledged. So is whatever comes after it [MQTT-4.9.0-2].
func TestReceiveMaximumIsGivenBack(t *testing.T) {
	s := newSettableClock()
	b := newBench(t, s.clock())
	d := b.connect("T", receiveMaximum(1)).listen()
	for round := range 3 {
		b.Publish(d.topic("get/accepted"), fmt.Append(nil, round))
		acked := b.command(fmt.Sprintf("command %d", round), s.clock().In(10*time.Second))
		first := d.wantMessage(fmt.Sprint(round))
		d.ping() // there is no room for more [MQTT-3.3.4-9]
		s.step(4*time.Second, 4*time.Second)
		d.ack(first.PacketID)
		pk := d.wantMessage(fmt.Sprintf("command %d", round))
		if pk.Properties.MessageExpiryInterval != 6 { // [MQTT-3.3.2-6]
			t.Errorf("message expiry %d, want 6", pk.Properties.MessageExpiryInterval)
		}
		d.ack(pk.PacketID)
		d.ping()
		if acked.Load() != 1 {
			t.Fatalf("round %d: acknowledged %d times", round, acked.Load())
		}
		s.step(time.Hour, time.Hour)
		d.ping()
	}
}

// What a device publishes has packet ids of the device's own. They acknowledge
// no command, whatever their number [MQTT-2.2.1-4].
func TestOwnPublishIsNoAcknowledgement(t *testing.T) {
	s := newSettableClock()
	b := newBench(t, s.clock())
	d := b.connect("T").listen()
	acked := b.command("command", s.clock().In(time.Hour))
	pk := publishPacket(d.topic("update"), "report", 1)
	pk.PacketID = d.wantMessage("command").PacketID
	d.send(pk)
	d.want(packets.Puback)
	d.ping()
	if acked.Load() != 0 {
		t.Error("the device's own message acknowledged the command")
	}
	s.step(2*time.Hour, 2*time.Hour)
	d.wantReset()
}

// Other messages are queued for the same device while a command is. The command
// is the one with the deadline, and what happens to the others is not its end.
func TestOtherMessagesWhileACommandIsQueued(t *testing.T) {
	s := newSettableClock()
	b := newBench(t, s.clock())
	d := b.connect("T").listen()
	b.Publish(d.topic("get/accepted"), []byte("other"))
	acked := b.command("command", s.clock().In(time.Hour))
	d.ack(d.wantMessage("other").PacketID)
	d.wantMessage("command")
	d.ping()
	if acked.Load() != 0 {
		t.Error("another message acknowledged the command")
	}
	s.step(2*time.Hour, 2*time.Hour)
	d.wantReset()
}

// A queue without room for a command: nothing was sent, and no deadline is left
// behind that could end the connection.
func TestDroppedCommand(t *testing.T) {
	s := newSettableClock()
	b := newBench(t, s.clock())
	d := b.connect("T", func(pk *packets.Packet) { pk.Properties.ReceiveMaximum = 1 }).listen()
	b.Publish(delta, []byte("first"))
	first := d.wantMessage("first") // unacknowledged, so that what follows waits
	for i := range queuedMost {
		b.Publish(delta, fmt.Append(nil, i))
	}
	if err := b.Command("T", delta, []byte("command"), s.clock().In(time.Hour), nil); !errors.Is(err, shadow.ErrOffline) {
		t.Errorf("Command: %v", err)
	}
	s.step(2*time.Hour, 2*time.Hour)
	d.ack(first.PacketID)
	for i := range queuedMost {
		d.ack(d.wantMessage(fmt.Sprint(i)).PacketID)
	}
	d.ping()
}

// Packet ids wrap around past what is still unacknowledged, and 0 is none
// [MQTT-2.2.1-3].
func TestPacketIDsWrapAround(t *testing.T) {
	o := &outbox{unacked: map[uint16]*message{65534: {}, 1: {}}, lastID: 65533}
	for _, want := range []uint16{65535, 2} {
		if got := o.publish(&message{topic: delta, qos: 1}).PacketID; got != want {
			t.Errorf("packet id %d, want %d", got, want)
		}
	}
}

// link is a stretch of network between a device and the broker that can fail.
// While it is down it takes nothing in, so that what is sent stays with the
// sender; a reset goes through it as a reset.
type link struct {
	addr string
	mu   sync.Mutex // held while it is down
}

func newLink(t *testing.T, to string) *link {
	t.Helper()
	near, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { _ = near.Close() })
	l := &link{addr: near.Addr().String()}
	go func() {
		device, err := near.Accept()
		if err != nil {
			return
		}
		server, err := smallWindow().Dial("tcp", to)
		if err != nil {
			return
		}
		go l.forward(server, device)
		l.forward(device, server)
	}()
	return l
}

func (l *link) forward(to, from net.Conn) {
	buf := make([]byte, 512)
	for {
		n, err := from.Read(buf)
		l.mu.Lock()
		if n > 0 {
			_, _ = to.Write(buf[:n])
		}
		l.mu.Unlock()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				_ = to.(*net.TCPConn).SetLinger(0)
			}
			_ = to.Close()
			return
		}
	}
}

// stall takes the link down and fills it, so that a command stays behind in the
// kernel of the server.
func (b *bench) stall(l *link, d *device) {
	b.t.Helper()
	l.mu.Lock()
	for range 8 {
		b.Publish(d.topic("get/accepted"), []byte(strings.Repeat("x", 16<<10)))
	}
}

// wantNoCommand reads what still comes until the connection ends.
func (d *device) wantNoCommand() {
	d.t.Helper()
	for {
		pk, err := d.read()
		if err != nil {
			return
		}
		if string(pk.Payload) == "command" {
			d.t.Fatal("the command arrived after its deadline")
		}
	}
}

// Invariant 1: a half-open connection delivers no command after its deadline.
func TestHalfOpenLink(t *testing.T) {
	c := system
	b := newBench(t, c)
	l := newLink(t, b.addr)
	d := b.over(&net.Dialer{}, l.addr, b.ca.enrolled(t, "T")).connect("T").listen()
	gone := b.gone("T")
	b.stall(l, d)
	b.command("command", c.In(300*time.Millisecond))
	await(t, gone, "the end of the connection")
	l.mu.Unlock()
	d.wantNoCommand()
}

// The same if the device comes back by another way before the deadline: the
// older connection is closed, and what its kernel holds is thrown away.
func TestHalfOpenLinkOfAnOlderConnection(t *testing.T) {
	b := newBench(t, system)
	l := newLink(t, b.addr)
	d := b.over(&net.Dialer{}, l.addr, b.ca.enrolled(t, "T")).connect("T").listen()
	b.stall(l, d)
	b.command("command", system.In(time.Minute))
	b.connect("T")
	l.mu.Unlock()
	d.wantNoCommand()
}
