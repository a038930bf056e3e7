package broker

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/openlock/openlock/internal/shadow"
)

// No deadline before CONNECT is known to bite: whoever says nothing is cut off,
// wherever they stop.
func TestSilentConnectionsAreCutOff(t *testing.T) {
	t.Parallel()
	b := newBench(t, system)
	start := time.Now()
	afterTCP, err := net.Dial("tcp", b.addr)
	check(t, err)
	amidConnect := b.dial(b.ca.enrolled(t, "T"))
	_, err = amidConnect.conn.Write([]byte("\x10\x20\x00\x04MQTT"))
	check(t, err)
	var silent sync.WaitGroup
	for name, c := range map[string]net.Conn{
		"after TCP": afterTCP, "after TLS": b.dial(b.ca.enrolled(t, "T")).conn, "amid CONNECT": amidConnect.conn,
	} {
		silent.Go(func() {
			_ = c.SetReadDeadline(start.Add(patience))
			_, err := c.Read(make([]byte, 1))
			if took := time.Since(start); took < helloWithin-time.Second || took > helloWithin+3*time.Second {
				t.Errorf("%s: cut off after %s: %v", name, took, err)
			}
		})
	}
	silent.Wait()
}

// Close ends at once, even while somebody has not said CONNECT, and disconnects
// whoever has.
func TestCloseDoesNotWaitForTheSilent(t *testing.T) {
	b := newBench(t, system)
	b.dial(b.ca.enrolled(t, "silent"))
	d := b.connect("T")
	start := time.Now()
	b.Close()
	if took := time.Since(start); took > helloWithin/2 {
		t.Errorf("Close took %s", took)
	}
	if code := d.want(packets.Disconnect).ReasonCode; code != packets.ErrServerShuttingDown.Code {
		t.Errorf("DISCONNECT %#x", code)
	}
}

// The same for one that is cut off between its handshake and its first wait.
func TestCloseBeforeTheFirstWait(t *testing.T) {
	b := newBench(t, system)
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	check(t, err)
	defer func() { _ = l.Close() }()
	go b.over(&net.Dialer{}, l.Addr().String(), b.ca.enrolled(t, "T"))
	tcp, err := l.AcceptTCP()
	check(t, err)
	w := newWire(tcp, b.clock)
	c := tls.Server(w, b.tls)
	check(t, c.Handshake())
	b.Close()
	start := time.Now()
	newSession(b.Broker, "T", w, c).run()
	if took := time.Since(start); took > helloWithin/2 {
		t.Errorf("it took %s to end", took)
	}
}

// A keep-alive of 0 or beyond what is allowed becomes the server's [MQTT-3.2.2-21].
func TestServerKeepAlive(t *testing.T) {
	b := newBench(t, system)
	for asked, want := range map[uint16]uint16{0: keepaliveMost, 65535: keepaliveMost, keepaliveMost: 0, 60: 0} {
		ack := b.dial(b.ca.enrolled(t, "T")).hello("T", func(pk *packets.Packet) { pk.Connect.Keepalive = asked })
		if p := ack.Properties; p.ServerKeepAlive != want || p.ServerKeepAliveFlag != (want > 0) {
			t.Errorf("keep-alive %d: server's is %d, told %t", asked, p.ServerKeepAlive, p.ServerKeepAliveFlag)
		}
	}
}

// Broker: a duplicate client id ends the older connection [MQTT-3.1.4-3]. Its
// Last Will comes before anything of the newer one.
func TestNewerConnectionEndsTheOlder(t *testing.T) {
	b := newBench(t, system)
	topic := shadow.Address{Thing: "T"}.Topic("update")
	older := b.connect("T", withWill(topic, "will")).listen()
	newer := b.connect("T").listen()
	if len(b.requests) == 0 {
		t.Error("the newer connection was let in before the Last Will of the older")
	}
	b.wantRequest(request{"T", topic, "will"})
	if code := older.want(packets.Disconnect).ReasonCode; code != packets.ErrSessionTakenOver.Code {
		t.Errorf("DISCONNECT %#x", code)
	}
	_ = older.wantEnd()
	b.Publish(topic+"/delta", []byte("marker"))
	newer.wantMessage("marker")
}

// A connection that ends takes nothing away from the one that comes after it:
// that one begins when nothing runs for the older any more.
func TestEndOfTheOlderDoesNotHarmTheNewer(t *testing.T) {
	b := newBench(t, system)
	topic := shadow.Address{Thing: "T"}.Topic("update")
	reached, proceed := make(chan struct{}), make(chan struct{})
	b.handle = func(request) {
		close(reached)
		<-proceed
	}
	older := b.connect("T", withWill(topic, "will")).listen()
	gone := b.gone("T")
	_ = older.conn.NetConn().Close()
	await(t, reached, "the Last Will of the older connection")

	newer := b.dial(b.ca.enrolled(t, "T"))
	newer.thing = "T"
	newer.send(connectPacket("T"))
	_ = newer.conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond)) // long enough to go wrong
	if _, err := newer.r.Peek(1); err == nil {
		t.Error("CONNACK while the older connection has not ended")
	}
	close(proceed)
	await(t, gone, "the end of the older connection")
	newer.r.Reset(newer.conn)
	newer.want(packets.Connack)
	newer.listen()
	if !b.Present("T") {
		t.Error("the newer connection is not present")
	}
	b.Publish(newer.topic("update/delta"), []byte("marker"))
	newer.wantMessage("marker")
}

// Many connections of one name at a time leave one of them, and it works.
func TestStampedeOfOneName(t *testing.T) {
	b := newBench(t, system)
	cert := b.ca.enrolled(t, "T")
	var stampede sync.WaitGroup
	for range 20 {
		d := b.dial(cert)
		d.version = 5
		stampede.Go(func() {
			_ = d.write(connectPacket("T"))
			_, _ = d.read()
		})
	}
	stampede.Wait()
	last := b.dial(cert).connect("T").listen()
	b.Publish(last.topic("update/delta"), []byte("marker"))
	last.wantMessage("marker")
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.sessions); n != 1 {
		t.Errorf("%d connections are open", n)
	}
}

// Nothing waits for a device that comes back, however it asks for a session.
func TestSessionsAreClean(t *testing.T) {
	unclean := map[string]func(*packets.Packet){
		"3.1.1 clean session 0": func(pk *packets.Packet) { pk.ProtocolVersion, pk.Connect.Clean = 4, false },
		"5 session expiry": func(pk *packets.Packet) {
			pk.Connect.Clean = false
			pk.Properties.SessionExpiryInterval, pk.Properties.SessionExpiryIntervalFlag = 3600, true
		},
	}
	for name, change := range unclean {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, system)
			d := b.dial(b.ca.enrolled(t, "T"))
			d.wantClean(d.hello("T", change))
			d.listen()
			topic := d.topic("update/delta")
			b.Publish(topic, []byte("never acknowledged"))
			d.wantMessage("never acknowledged")

			gone := b.gone("T")
			_ = d.conn.NetConn().Close()
			await(t, gone, "the end of the connection")
			b.Publish(topic, []byte("away"))
			err := b.Command("T", topic, []byte("command"), system.In(time.Hour), nil)
			if b.Present("T") || !errors.Is(err, shadow.ErrOffline) {
				t.Errorf("while it is away: present %t, Command: %v", b.Present("T"), err)
			}

			back := b.dial(b.ca.enrolled(t, "T"))
			back.wantClean(back.hello("T", change))
			b.Publish(topic, []byte("not subscribed"))
			back.listen()
			b.Publish(topic, []byte("marker"))
			back.wantMessage("marker")
		})
	}
}

func (d *device) wantClean(ack packets.Packet) {
	d.t.Helper()
	if ack.ReasonCode != 0 || ack.SessionPresent || ack.Properties.SessionExpiryInterval != 0 {
		d.t.Errorf("CONNACK %#x, session present %t, expiry %d", ack.ReasonCode, ack.SessionPresent, ack.Properties.SessionExpiryInterval)
	}
	if d.version == 5 && !ack.Properties.SessionExpiryIntervalFlag { // [MQTT-3.2.2-8]
		d.t.Error("CONNACK does not tell the session expiry")
	}
}

// A connection counts as present only once it has subscribed to its delta with
// QoS 1, by whatever filter.
func TestPresent(t *testing.T) {
	b := newBench(t, system)
	if b.Present("T") {
		t.Error("present without a connection")
	}
	tests := []struct {
		suffix string
		qos    byte
		want   bool
	}{
		{"update/delta", 1, true},
		{"update/delta", 2, true}, // granted as 1
		{"update/delta", 0, false},
		{"update/+", 1, true},
		{"update/+", 0, false},
		{"+/delta", 1, true},
		{"update/#", 1, true},
		{"update/delta/#", 1, true}, // # includes its parent [MQTT-4.7.1-2]
		{"#", 1, true},
		{"#", 0, false},
		{"update/accepted", 1, false},
		{"get/+", 1, false},
		{"+", 1, false},
		{"update/delta/+", 1, false},
		{"name/+/update/delta", 1, false}, // a named shadow's
	}
	for _, test := range tests {
		t.Run(fmt.Sprint(test.suffix, test.qos), func(t *testing.T) {
			d := b.connect("T")
			if b.Present("T") {
				t.Error("present before it has subscribed")
			}
			d.subscribe(d.topic(test.suffix), test.qos)
			if got := b.Present("T"); got != test.want {
				t.Errorf("present: %t, want %t", got, test.want)
			}
			err := b.Command("T", d.topic("update/delta"), []byte("command"), system.In(time.Hour), nil)
			if (err == nil) != test.want {
				t.Errorf("Command: %v", err)
			}
			if test.want {
				d.wantMessage("command")
			}
			d.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}})
			_ = d.wantEnd()
		})
	}
	d := b.connect("T").listen()
	d.subscribe(d.topic("update/delta"), 1)
	d.subscribe(d.topic("update/delta"), 0) // replaces it [MQTT-3.8.4-3]
	d.subscribe(d.topic("#"), 0)
	if b.Present("T") {
		t.Error("present by a subscription that was replaced")
	}
}

// smallWindow connects with hardly any room for what is not read.
func smallWindow() *net.Dialer {
	return &net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		_ = raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
		return err
	}}
}

// A device that does not read harms only itself: it is cut off, whatever it goes
// on sending, others get their messages, and nobody is held up.
func TestSlowReaderHarmsOnlyItself(t *testing.T) {
	t.Parallel()
	for _, qos := range []byte{0, 1} {
		t.Run(fmt.Sprintf("QoS %d", qos), func(t *testing.T) {
			t.Parallel()
			b := newBench(t, system)
			other := b.connect("other").listen()
			slow := b.over(smallWindow(), b.addr, b.ca.enrolled(t, "slow")).connect("slow")
			slow.subscribe(slow.topic("#"), qos)
			gone := b.gone("slow")
			go slow.sendUntil(gone)
			start, big := time.Now(), []byte(strings.Repeat("x", 60<<10))
			flooded := make(chan struct{})
			go func() {
				defer close(flooded)
				for range 1000 {
					b.Publish(slow.topic("get/accepted"), big)
				}
			}()
			for i := range 20 {
				b.Publish(other.topic("update/delta"), fmt.Append(nil, i))
				other.ack(other.wantMessage(fmt.Sprint(i)).PacketID)
			}
			await(t, flooded, "publishing to a device that does not read")
			if took := time.Since(start); took > writeWithin/2 {
				t.Errorf("publishing was held up for %s", took)
			}
			await(t, gone, "the end of a connection that is not read")
			if took := time.Since(start); took > writeWithin+5*time.Second {
				t.Errorf("it was cut off after %s", took)
			}
		})
	}
}

// sendUntil sends requests that ask for no answer.
func (d *device) sendUntil(done <-chan struct{}) {
	for d.write(publishPacket(d.topic("get"), "{}", 0)) == nil {
		select {
		case <-done:
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// A device that is silent for one and a half keep-alives is cut off
// [MQTT-3.1.2-22]; one that is not, is not.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	b := newBench(t, system)
	short := func(pk *packets.Packet) { pk.Connect.Keepalive = 1 }
	silent, alive := b.connect("silent", short), b.connect("alive", short)
	start, gone := time.Now(), b.gone("silent")
	for done := false; !done; {
		alive.ping()
		select {
		case <-gone:
			done = true
		case <-time.After(100 * time.Millisecond):
		}
	}
	if took := time.Since(start); took < 1400*time.Millisecond || took > 3*time.Second {
		t.Errorf("cut off after %s", took)
	}
	_ = silent.wantEnd()
	alive.ping()
}

// Who asks and never reads the answers is cut off once there are too many.
func TestAnswersAreBounded(t *testing.T) {
	b := newBench(t, system)
	d := b.connect("T")
	out := b.session("T").out
	out.mu.Lock()
	out.writing = true // and never comes to an end, as with a device that does not read
	out.mu.Unlock()
	for range queuedMost + 1 {
		d.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})
	}
	d.wantReset()
	out.mu.Lock()
	out.writing = false
	out.mu.Unlock()
}

// A device that floods waits for its own requests, and others do not.
func TestFloodHarmsOnlyItself(t *testing.T) {
	b := newBench(t, system)
	release := make(chan struct{})
	b.handle = func(r request) {
		if r.thing == "flood" {
			<-release
		}
		b.requests <- r
	}
	flood, other := b.connect("flood"), b.connect("other")
	const many = 2000
	for range many {
		flood.publish(flood.topic("get"), "{}", 0)
	}
	other.publish(other.topic("get"), "{}", 1)
	b.wantRequest(request{"other", other.topic("get"), "{}"})
	other.want(packets.Puback)
	close(release)
	for range many {
		b.wantRequest(request{"flood", flood.topic("get"), "{}"})
	}
}

// What is unsubscribed is not sent, and the delta's counts for presence no more.
func TestUnsubscribe(t *testing.T) {
	b := newBench(t, system)
	for _, version := range []byte{4, 5} {
		d := b.connect("T", func(pk *packets.Packet) { pk.ProtocolVersion = version }).listen()
		d.subscribe(d.topic("get/+"), 1)
		d.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe, Qos: 1}, PacketID: 1,
			Filters: packets.Subscriptions{{Filter: d.topic("#")}, {Filter: d.topic("never")}},
		})
		ack := d.want(packets.Unsuback)
		if version == 5 && string(ack.ReasonCodes) != "\x00\x11" { // [MQTT-3.11.3-2]
			t.Errorf("UNSUBACK %#x", ack.ReasonCodes)
		}
		if b.Present("T") {
			t.Error("still present")
		}
		b.Publish(d.topic("update/delta"), []byte("unsubscribed"))
		b.Publish(d.topic("get/accepted"), []byte("marker"))
		d.wantMessage("marker")
	}
}

// A message comes once, whatever filters overlap, with their identifiers
// [MQTT-3.3.4-3] and the greatest of their QoS [MQTT-3.3.4-2].
func TestOverlappingSubscriptions(t *testing.T) {
	b := newBench(t, system)
	d := b.connect("T")
	for id, sub := range map[int]packets.Subscription{7: {Filter: d.topic("#"), Qos: 1}, 9: {Filter: d.topic("get/+"), Qos: 0}} {
		d.send(packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Subscribe, Qos: 1}, PacketID: 1,
			Properties: packets.Properties{SubscriptionIdentifier: []int{id}}, Filters: packets.Subscriptions{sub},
		})
		d.want(packets.Suback)
	}
	b.Publish(d.topic("get/accepted"), []byte("both"))
	pk := d.wantMessage("both")
	if ids := fmt.Sprint(pk.Properties.SubscriptionIdentifier); ids != "[7 9]" || pk.FixedHeader.Qos != 1 {
		t.Errorf("identifiers %s, QoS %d", ids, pk.FixedHeader.Qos)
	}
	b.Publish(d.topic("update/delta"), []byte("marker"))
	d.wantMessage("marker")
}

// A device is sent no packet that is larger than it takes [MQTT-3.1.2-24], and
// a command that would be is refused.
func TestMaximumPacketSize(t *testing.T) {
	b := newBench(t, system)
	d := b.connect("T", func(pk *packets.Packet) { pk.Properties.MaximumPacketSize = 100 }).listen()
	big := []byte(strings.Repeat("x", 100))
	b.Publish(delta, big)
	if err := b.Command("T", delta, big, system.In(time.Hour), nil); !errors.Is(err, shadow.ErrOffline) {
		t.Errorf("Command: %v", err)
	}
	b.Publish(delta, []byte("marker"))
	d.wantMessage("marker")
}

// Subscriptions cost memory, so a device has a bounded number of them.
func TestSubscriptionsAreBounded(t *testing.T) {
	b := newBench(t, system)
	d := b.connect("T")
	for i := range filtersMost {
		if code := d.subscribe(d.topic(fmt.Sprintf("name/n%d/update/delta", i)), 1); code != 1 {
			t.Fatalf("subscription %d: SUBACK %#x", i, code)
		}
	}
	if code := d.subscribe(d.topic("one/more"), 1); code != packets.ErrQuotaExceeded.Code {
		t.Errorf("SUBACK %#x", code)
	}
	if code := d.subscribe(d.topic("name/n0/update/delta"), 1); code != 1 {
		t.Errorf("SUBACK %#x for a filter again", code)
	}
}

// Invariant 8: a revoked certificate is dead within 5 s, on open sessions too.
// What was under way to the device does not arrive later.
func TestRevokedCertificate(t *testing.T) {
	b := newBench(t, system)
	cert, other := b.ca.enrolled(t, "T"), b.connect("other").listen()
	d := b.dial(cert).connect("T").listen()
	start := time.Now()
	b.revoke(cert)
	if code := d.want(packets.Disconnect).ReasonCode; code != packets.ErrNotAuthorized.Code {
		t.Errorf("DISCONNECT %#x", code)
	}
	_ = d.wantEnd()
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	if ack := b.dial(cert).hello("T"); ack.ReasonCode != packets.ErrNotAuthorized.Code {
		t.Errorf("CONNACK %#x", ack.ReasonCode)
	}
	b.dial(b.ca.enrolled(t, "T")).connect("T") // a new one is good
	other.ping()
}

// A certificate that ends while its device is connected ends the session too.
func TestCertificateThatEnds(t *testing.T) {
	s := newSettableClock()
	b := newBench(t, s.clock())
	d := b.connect("T").listen()
	d.ping()
	s.step(2*deviceLife, 0)
	_ = d.wantEnd()
}
