package broker

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// Invariant 10: a device connects only with a certificate of this authority.
func TestCertificateMustBeOurs(t *testing.T) {
	b := newBench(t, system)
	tests := map[string][]tls.Certificate{
		"none":            nil,
		"of another CA":   {newCA(t).enrolled(t, "T")},
		"expired":         {b.ca.issued(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })},
		"not of a device": {b.ca.issued(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })},
	}
	for name, certs := range tests {
		t.Run(name, func(t *testing.T) {
			d := b.dial(certs...) // TLS 1.3: the client is done before the server has looked
			if _, err := d.read(); err == nil || !strings.Contains(err.Error(), "remote error: tls:") {
				t.Fatalf("got %v, want a TLS alert", err)
			}
		})
	}
}

// Invariant 10: a device connects only under its own client id, and the name is
// a thing's ([a-zA-Z0-9:_-]{1,128}).
func TestClientIDMustBeTheNameInTheCertificate(t *testing.T) {
	b := newBench(t, system)
	tests := []struct{ name, cert, id string }{
		{"another's", "T", "victim"},
		{"none", "T", ""},
		{"another case", "T", "t"},
		{"longer", "T", "T2"},
		{"a wildcard", "+", "+"},
		{"with a slash", "T/shadow", "T/shadow"},
		{"no name", "", ""},
		{"too long", strings.Repeat("n", 129), strings.Repeat("n", 129)}, // no CA makes it, X.509 allows 64
	}
	for _, test := range tests {
		for _, version := range []byte{4, 5} {
			t.Run(test.name, func(t *testing.T) {
				d := b.dial(b.ca.issued(t, func(c *x509.Certificate) { c.Subject.CommonName = test.cert }))
				ack := d.hello(test.id, func(pk *packets.Packet) { pk.ProtocolVersion = version })
				if ack.ReasonCode == 0 {
					t.Fatal("it was let in")
				}
				_ = d.wantEnd()
			})
		}
	}
	b.connect("T")
}

// Broker: ALPN x-amzn-mqtt-ca is accepted on any port.
func TestALPN(t *testing.T) {
	b := newBench(t, system)
	for _, offered := range []string{"x-amzn-mqtt-ca", "mqtt"} {
		c, err := tls.Dial("tcp", b.addr, &tls.Config{
			RootCAs: b.ca.Pool(), ServerName: "localhost", NextProtos: []string{offered},
			Certificates: []tls.Certificate{b.ca.enrolled(t, "T")}, MinVersion: tls.VersionTLS12,
		})
		check(t, err)
		defer func() { _ = c.Close() }()
		if got := c.ConnectionState().NegotiatedProtocol; got != offered {
			t.Errorf("negotiated %q, want %q", got, offered)
		}
	}
}

// Invariant 10: a device publishes only its own requests. Whoever listens to
// everything of their own hears nothing of what it tries.
func TestPublishOnlyOwnRequests(t *testing.T) {
	b := newBench(t, system)
	victim := b.connect("victim").listen()
	topics := []string{
		victim.topic("update"), victim.topic("get"), victim.topic("update/delta"), "$aws/things/victim/shadow/name/n/update",
		"$aws/things/T/shadow/update/delta", "$aws/things/T/shadow/update/accepted", "$aws/things/T/shadow/get/accepted",
		"$aws/things/T/shadow", "$aws/things/T/shadow/name//update", "$aws/things/T/shadow/name/n/update/delta",
		"$aws/things/T2/shadow/update", "$aws/events/presence/connected/T", "$SYS/broker/version", "x",
	}
	for _, version := range []byte{4, 5} {
		for _, topic := range topics {
			attack(t, b, version, topic)
		}
	}
	b.Publish(victim.topic("get/accepted"), []byte("marker"))
	victim.wantMessage("marker")
}

func attack(t *testing.T, b *bench, version byte, topic string) {
	t.Helper()
	for _, qos := range []byte{0, 1} {
		d := b.connect("T", func(pk *packets.Packet) { pk.ProtocolVersion = version }).listen()
		d.publish(topic, "attack", qos)
		if version == 5 && qos == 1 {
			if code := d.want(packets.Puback).ReasonCode; code != packets.ErrNotAuthorized.Code {
				t.Errorf("%q: PUBACK %#x, want not authorized", topic, code)
			}
			d.ping()
		} else {
			_ = d.wantEnd() // there is no other way to refuse [MQTT-3.3.5-2]
		}
		if len(b.requests) > 0 {
			t.Errorf("%q: the handler got %+v", topic, <-b.requests)
		}
	}
}

// A topic alias is no way around the check: none is granted [MQTT-3.3.2-9].
func TestTopicAliasDoesNotHideATopic(t *testing.T) {
	b := newBench(t, system)
	for _, topic := range []string{"$aws/things/victim/shadow/update", "$aws/things/T/shadow/update", ""} {
		d := b.connect("T")
		pk := publishPacket(topic, "attack", 1)
		pk.Properties = packets.Properties{TopicAlias: 1, TopicAliasFlag: true}
		d.send(pk)
		if code := d.want(packets.Disconnect).ReasonCode; code != packets.ErrTopicAliasInvalid.Code && topic != "" {
			t.Errorf("%q: DISCONNECT %#x, want topic alias invalid", topic, code)
		}
	}
	if len(b.requests) > 0 {
		t.Errorf("the handler got %+v", <-b.requests)
	}
}

// Invariant 10: a device subscribes only below its own name. No share and
// no wildcard before it is a way around that.
func TestSubscribeOnlyBelowOwnName(t *testing.T) {
	b := newBench(t, system)
	refused := []string{
		"#", "+/#", "+/things/victim/shadow/#", "+/+/+/+/#", "$aws/#", "$aws/things/#", "$aws/things/+/shadow/#",
		"$aws/things/victim/shadow/update/delta", "$aws/things/T2/shadow/#", "$aws/things/T/#", "$aws/things/T/shadow",
		"$share/g/#", "$share/g/$aws/things/T/shadow/#", "$SHARE/g/$aws/things/victim/shadow/#",
		"$SYS/#", "$aws/events/presence/connected/T",
		"$aws/things/T/shadow/update",                                                              // a request's: nothing comes there
		"$aws/things/T/shadow/#/delta", "$aws/things/T/shadow/update+", "$aws/things/T/shadow/up#", // [MQTT-4.7.1-1]
		"$aws/things/T/shadow/1/2/3/4/5", // more levels than any topic has
	}
	allowed := []string{"#", "+/delta", "get/+", "update/delta", "name/n/update/accepted", "name/+/update/+"}
	for _, version := range []byte{4, 5} {
		d := b.connect("T", func(pk *packets.Packet) { pk.ProtocolVersion = version })
		for _, filter := range refused {
			if code := d.subscribe(filter, 1); code < 0x80 {
				t.Errorf("%s: SUBACK %#x", filter, code)
			}
		}
		b.Publish("$aws/things/victim/shadow/update/delta", []byte("secret"))
		for _, suffix := range allowed {
			if code := d.subscribe(d.topic(suffix), 2); code != 1 {
				t.Errorf("%s: SUBACK %#x, want QoS 1", suffix, code)
			}
		}
		b.Publish("$aws/things/victim/shadow/update/delta", []byte("secret"))
		b.Publish(d.topic("update/delta"), []byte("marker"))
		d.wantMessage("marker")
	}
}

// Invariant 10: a device leaves a Last Will only under its own name.
func TestLastWillOnlyOnOwnRequests(t *testing.T) {
	b := newBench(t, system)
	victim := b.connect("victim").listen()
	for _, topic := range []string{
		victim.topic("update/delta"), victim.topic("update"), "$aws/things/T/shadow/update/delta", "$aws/things/T/shadow/#", "x",
	} {
		for _, version := range []byte{4, 5} {
			d := b.dial(b.ca.enrolled(t, "T"))
			ack := d.hello("T", withWill(topic, "attack"), func(pk *packets.Packet) { pk.ProtocolVersion = version })
			if ack.ReasonCode == 0 {
				t.Errorf("a Last Will on %s was taken", topic)
			}
			_ = d.conn.Close()
		}
	}
	b.Publish(victim.topic("get/accepted"), []byte("marker"))
	victim.wantMessage("marker")
	if len(b.requests) > 0 {
		t.Errorf("the handler got %+v", <-b.requests)
	}
}

func withWill(topic, payload string) func(*packets.Packet) {
	return func(pk *packets.Packet) {
		pk.Connect.WillFlag, pk.Connect.WillQos = true, 1
		pk.Connect.WillTopic, pk.Connect.WillPayload = topic, []byte(payload)
	}
}

// A Last Will on one's own shadow is one's own update. It comes at once, for
// the session ends with the connection [MQTT-3.1.3-9], and comes once.
func TestLastWillIsADevicesOwnUpdate(t *testing.T) {
	b := newBench(t, system)
	topic := "$aws/things/T/shadow/update"
	delayed := func(pk *packets.Packet) {
		pk.Properties.SessionExpiryInterval, pk.Properties.SessionExpiryIntervalFlag = 3600, true
		pk.Connect.WillProperties.WillDelayInterval = 1800
	}
	ends := map[string]func(*device){
		"lost": func(d *device) { _ = d.conn.NetConn().Close() },
		"DISCONNECT with it": func(d *device) {
			d.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}, ReasonCode: packets.CodeDisconnectWillMessage.Code})
		},
		"a second CONNECT": func(d *device) {
			d.send(connectPacket("T"))
			_ = d.wantEnd()
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			d := b.connect("T", withWill(topic, "will"), delayed)
			gone := b.gone("T")
			end(d)
			await(t, gone, "the end of the connection")
			b.wantRequest(request{"T", topic, "will"})
			if len(b.requests) > 0 {
				t.Errorf("the handler got %+v too", <-b.requests)
			}
		})
	}
	t.Run("DISCONNECT discards it", func(t *testing.T) { // [MQTT-3.14.4-3]
		d := b.connect("T", withWill(topic, "will"), delayed)
		gone := b.gone("T")
		d.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}})
		await(t, gone, "the end of the connection")
		if len(b.requests) > 0 {
			t.Errorf("the handler got %+v", <-b.requests)
		}
	})
}

// Nothing is retained, neither of a device's nor of the server's, and no Last
// Will that asks for it is taken, nor one with QoS 2.
func TestNothingIsRetained(t *testing.T) {
	b := newBench(t, system)
	d := b.connect("T").listen()
	pk := publishPacket(d.topic("update"), "mine", 1)
	pk.FixedHeader.Retain = true
	d.send(pk)
	b.wantRequest(request{"T", d.topic("update"), "mine"})
	d.want(packets.Puback)
	b.Publish(d.topic("update/delta"), []byte("early"))
	if d.wantMessage("early").FixedHeader.Retain {
		t.Error("the message is marked as retained")
	}
	will := b.dial(b.ca.enrolled(t, "T")).hello("T", withWill(d.topic("update"), "will"), func(pk *packets.Packet) { pk.Connect.WillRetain = true })
	if will.ReasonCode != packets.ErrRetainNotSupported.Code { // [MQTT-3.2.2-13]
		t.Errorf("CONNACK %#x for a retained Last Will", will.ReasonCode)
	}
	will = b.dial(b.ca.enrolled(t, "T")).hello("T", withWill(d.topic("update"), "will"), func(pk *packets.Packet) { pk.Connect.WillQos = 2 })
	if will.ReasonCode != packets.ErrQosNotSupported.Code { // [MQTT-3.2.2-12]
		t.Errorf("CONNACK %#x for a Last Will with QoS 2", will.ReasonCode)
	}
	later := b.connect("T").listen()
	b.Publish(later.topic("get/accepted"), []byte("marker"))
	later.wantMessage("marker")
}

// QoS 2 is not offered: CONNACK says so, and who uses it is cut off [MQTT-3.2.2-11].
func TestQoS2IsRefused(t *testing.T) {
	b := newBench(t, system)
	for _, version := range []byte{4, 5} {
		d := b.connect("T", func(pk *packets.Packet) { pk.ProtocolVersion = version })
		d.publish(d.topic("update"), "x", 2)
		_ = d.wantEnd()
	}
	ack := b.dial(b.ca.enrolled(t, "T")).hello("T")
	if p := ack.Properties; !p.MaximumQosFlag || p.MaximumQos != 1 {
		t.Errorf("CONNACK: maximum QoS %d, told %t", p.MaximumQos, p.MaximumQosFlag)
	}
	if len(b.requests) > 0 {
		t.Errorf("the handler got %+v", <-b.requests)
	}
}

// What an MQTT 5 device must not do, it is told: no retained messages, no
// shares, no larger packets [MQTT-3.2.2-14] [MQTT-3.2.2-15].
func TestConnackTellsTheLimits(t *testing.T) {
	b := newBench(t, system)
	p := b.dial(b.ca.enrolled(t, "T")).hello("T").Properties
	if !p.RetainAvailableFlag || p.RetainAvailable != 0 || !p.SharedSubAvailableFlag || p.SharedSubAvailable != 0 || p.MaximumPacketSize != packetMost {
		t.Errorf("CONNACK: %+v", p)
	}
}

// A PUBACK carries nothing of the PUBLISH [MQTT-3.4.2-3].
func TestPubackOfAPublishWithProperties(t *testing.T) {
	b := newBench(t, system)
	d := b.connect("T")
	pk := publishPacket(d.topic("update"), "x", 1)
	pk.Properties.User = []packets.UserProperty{{Key: "k", Val: "v"}}
	d.send(pk)
	if ack := d.want(packets.Puback); ack.ReasonCode != 0 || len(ack.Properties.User) > 0 || ack.PacketID != pk.PacketID {
		t.Errorf("PUBACK %d, reason %#x, %+v", ack.PacketID, ack.ReasonCode, ack.Properties.User)
	}
}

// Who breaks the protocol is cut off, and others do not notice.
func TestMalformedPackets(t *testing.T) {
	b := newBench(t, system)
	other := b.connect("other")
	cert := b.ca.enrolled(t, "T")
	tooLarge := "\x30\x80\x80\x04" // PUBLISH of 64 KiB
	fresh := map[string]string{
		"HTTP":                      "GET / HTTP/1.1\r\n\r\n",
		"a PUBLISH before CONNECT":  "\x30\x03\x00\x01x",
		"a CONNECT that is too big": "\x10\x80\x80\x04",
		"an endless length":         "\x10\xff\xff\xff\xff\xff",
		"MQTT 3.1":                  "\x10\x0f\x00\x06MQIsdp\x03\x02\x00\x3c\x00\x01T",
		"a CONNECT cut short":       "\x10\x04\x00\x04MQ",
		"zeros":                     "\x00\x00\x00\x00",
	}
	for name, bytes := range fresh {
		t.Run(name, func(t *testing.T) {
			d := b.dial(cert)
			d.version = 4
			_, err := d.conn.Write([]byte(bytes))
			check(t, err)
			_ = d.wantEnd()
		})
	}
	for name, bytes := range map[string]string{
		"too big": tooLarge, "no such type": "\xf1\x00", "SUBSCRIBE without flags": "\x80\x03\x00\x01\x00",
		"a PUBLISH cut short": "\x32\x02\x00\x09", "a topic that is not UTF-8": "\x30\x04\x00\x02\xff\xfe",
	} {
		t.Run(name, func(t *testing.T) {
			d := b.dial(cert).connect("T")
			_, err := d.conn.Write([]byte(bytes))
			check(t, err)
			_ = d.wantEnd()
		})
	}
	other.ping()
	if len(b.requests) > 0 {
		t.Errorf("the handler got %+v", <-b.requests)
	}
}

// Invariant 14: what a device sends may hold anything, so it is not logged.
func TestPayloadsAreNotLogged(t *testing.T) {
	b := newBench(t, system)
	d := b.connect("T", v311, func(pk *packets.Packet) {
		pk.Connect.PasswordFlag, pk.Connect.Password = true, []byte("secret-password")
		pk.Connect.UsernameFlag, pk.Connect.Username = true, []byte("?SDK=x")
	})
	d.publish("$aws/things/victim/shadow/update", "secret-payload", 1)
	_ = d.wantEnd()
	refused := b.dial(b.ca.enrolled(t, "T"))
	refused.hello("T", withWill("x", "secret-will"))
	b.Close()
	log := b.log.String()
	if !strings.Contains(log, "not authorized") {
		t.Error("the test is about refusals that are logged")
	}
	for _, secret := range []string{"secret-password", "secret-payload", "secret-will"} {
		if strings.Contains(log, secret) || strings.Contains(log, strings.Trim(fmt.Sprint([]byte(secret)), "[]")) {
			t.Errorf("%s in the log:\n%s", secret, log)
		}
	}
}
