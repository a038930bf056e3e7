package broker

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/openlock/openlock/internal/shadow"
)

// Limits of a session.
const (
	packetMost    = 64 << 10 // bytes of a packet that a device sends
	readBuffer    = 1 << 10
	filtersMost   = 100  // subscriptions; AWS IoT allows 50
	slashesMost   = 7    // of a shadow's longest topic
	keepaliveMost = 1200 // seconds, as AWS IoT
)

// session is one connection of one thing, from TLS to its end.
type session struct {
	broker *Broker
	thing  string // the name in the certificate
	tls    *tls.Conn
	in     *bufio.Reader
	out    *outbox
	ended  chan struct{} // closed when nothing runs for it any more

	version   byte // of MQTT: 4 is 3.1.1, 5 is 5
	keepalive time.Duration
	will      *will
	stopped   atomic.Pointer[packets.Code] // why the server ends it

	mu   sync.Mutex
	subs map[string]packets.Subscription
}

// will is a Last Will: a shadow request that is made for a device that is lost.
type will struct {
	topic   string
	payload []byte
}

func newSession(b *Broker, thing string, w *wire, c *tls.Conn) *session {
	return &session{
		broker: b, thing: thing, tls: c, in: bufio.NewReaderSize(c, readBuffer), out: newOutbox(w, c),
		ended: make(chan struct{}), subs: map[string]packets.Subscription{},
	}
}

// stop lets the session end itself soon, for a reason.
func (s *session) stop(why packets.Code) {
	s.stopped.CompareAndSwap(nil, &why)
	_ = s.out.wire.SetReadDeadline(time.Now())
}

// certificate is what the device has shown.
func (s *session) certificate() *x509.Certificate { return s.tls.ConnectionState().PeerCertificates[0] }

// run speaks MQTT until the session ends.
func (s *session) run() {
	defer close(s.ended)
	log := s.broker.log.With("thing", s.thing, "remote", s.tls.RemoteAddr().String())
	if err := s.connect(); err != nil {
		log.Info("device refused", "cause", err)
		s.out.end(nil)
		return
	}
	defer s.broker.dismiss(s)
	log.Info("device connected", "mqtt", s.version)
	err := s.read()
	s.out.end(s.farewell(err))
	if s.will != nil && !errors.Is(err, errGoodbye) { // [MQTT-3.1.2-8]
		s.request(s.will.topic, s.will.payload)
	}
	log.Info("device disconnected", "cause", err)
}

// errGoodbye ends a session that its device has ended in good order.
var errGoodbye = errors.New("the device said goodbye")

// farewell is what MQTT 5 lets a server say before it closes [MQTT-4.13.1-1].
func (s *session) farewell(err error) *packets.Packet {
	var code packets.Code
	if s.version < 5 || !errors.As(err, &code) {
		return nil
	}
	return &packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}, ProtocolVersion: s.version, ReasonCode: code.Code}
}

// connect takes CONNECT as the first packet [MQTT-3.1.0-1] and answers it.
func (s *session) connect() error {
	pk, err := s.packet(helloWithin)
	if err != nil {
		return err
	}
	if pk.FixedHeader.Type != packets.Connect {
		return packets.ErrProtocolViolationRequireFirstConnect
	}
	s.version = pk.ProtocolVersion
	if code := s.check(pk); code != packets.CodeSuccess {
		s.connack(code, packets.Properties{})
		return code
	}
	s.out.version, s.out.largest = s.version, pk.Properties.MaximumPacketSize
	if m := int(pk.Properties.ReceiveMaximum); m > 0 {
		s.out.quota = min(m, inflightMost)
	}
	if pk.Connect.WillFlag {
		s.will = &will{pk.Connect.WillTopic, pk.Connect.WillPayload}
	}
	s.broker.admit(s)
	s.connack(packets.CodeSuccess, s.offer(pk))
	return nil
}

// check says whether a device may connect so.
func (s *session) check(pk packets.Packet) packets.Code {
	if code := pk.ConnectValidate(); code != packets.CodeSuccess {
		return code
	}
	switch {
	case pk.ProtocolVersion != 4 && pk.ProtocolVersion != 5:
		return packets.ErrUnsupportedProtocolVersion
	case s.broker.refuses(s.certificate()):
		return packets.ErrNotAuthorized
	case !shadow.ValidThing(s.thing) || pk.Connect.ClientIdentifier != s.thing:
		return packets.ErrClientIdentifierNotValid // it must be the name in the certificate
	case pk.Connect.WillFlag && pk.Connect.WillQos > 1:
		return packets.ErrQosNotSupported
	case pk.Connect.WillFlag && pk.Connect.WillRetain:
		return packets.ErrRetainNotSupported // [MQTT-3.2.2-13]
	case pk.Connect.WillFlag && !mayPublish(s.thing, pk.Connect.WillTopic):
		return packets.ErrNotAuthorized
	}
	return packets.CodeSuccess
}

// offer is what the server grants, in CONNACK's properties (MQTT 5, 3.2.2.3).
func (s *session) offer(pk packets.Packet) packets.Properties {
	p := packets.Properties{
		ReceiveMaximum:    inflightMost,
		MaximumPacketSize: packetMost,
		MaximumQos:        1, MaximumQosFlag: true,
		RetainAvailable: 0, RetainAvailableFlag: true,
		SharedSubAvailable: 0, SharedSubAvailableFlag: true,
		SessionExpiryInterval: 0, SessionExpiryIntervalFlag: pk.Properties.SessionExpiryInterval > 0,
	}
	keepalive := pk.Connect.Keepalive
	if keepalive == 0 || keepalive > keepaliveMost { // or a device that has vanished is never noticed
		keepalive = keepaliveMost
		p.ServerKeepAlive, p.ServerKeepAliveFlag = keepalive, true // [MQTT-3.2.2-21]
	}
	s.keepalive = time.Duration(keepalive) * time.Second
	return p
}

func (s *session) connack(code packets.Code, p packets.Properties) {
	if s.version < 5 && code != packets.CodeSuccess {
		old, ok := packets.V5CodesToV3[code]
		if !ok {
			old = packets.Err3NotAuthorized // it has few codes
		}
		code = old
	}
	pk := packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connack}, ProtocolVersion: s.version, ReasonCode: code.Code, Properties: p,
	}
	if code == packets.CodeSuccess {
		s.out.answer(pk)
		return
	}
	s.out.end(&pk)
}

// read handles packets until one ends the session.
func (s *session) read() error {
	for {
		pk, err := s.packet(s.keepalive * 3 / 2) // [MQTT-3.1.2-22]
		if err == nil {
			err = s.take(pk)
		}
		if err != nil {
			return cmp.Or(s.ending(), err)
		}
	}
}

// ending is why the server ends the session, nil while it does not.
func (s *session) ending() error {
	if why := s.stopped.Load(); why != nil {
		return *why
	}
	if s.broker.closing.Err() != nil {
		return packets.ErrServerShuttingDown
	}
	return nil
}

// packet reads one packet, the whole of which must come within a time.
func (s *session) packet(within time.Duration) (pk packets.Packet, err error) {
	_ = s.tls.SetReadDeadline(time.Now().Add(within))
	if err := s.ending(); err != nil {
		return pk, err // the deadline above may have undone stop's
	}
	head, err := s.in.ReadByte()
	if err != nil {
		return pk, err
	}
	if err := pk.FixedHeader.Decode(head); err != nil {
		return pk, err
	}
	n, more, err := packets.DecodeLength(s.in)
	if err != nil {
		return pk, err
	}
	if 1+more+n > packetMost {
		return pk, packets.ErrPacketTooLarge // [MQTT-3.2.2-15]
	}
	pk.FixedHeader.Remaining, pk.ProtocolVersion = n, s.version
	body := make([]byte, n)
	if _, err := io.ReadFull(s.in, body); err != nil {
		return pk, err
	}
	return pk, decode(&pk, body)
}

// decode reads the packets that a client sends.
func decode(pk *packets.Packet, body []byte) error {
	switch pk.FixedHeader.Type {
	case packets.Connect:
		return pk.ConnectDecode(body)
	case packets.Publish:
		return pk.PublishDecode(body)
	case packets.Puback:
		return pk.PubackDecode(body)
	case packets.Subscribe:
		return pk.SubscribeDecode(body)
	case packets.Unsubscribe:
		return pk.UnsubscribeDecode(body)
	case packets.Pingreq:
		return nil
	case packets.Disconnect:
		return pk.DisconnectDecode(body)
	}
	return packets.ErrProtocolViolation
}

func (s *session) take(pk packets.Packet) error {
	switch pk.FixedHeader.Type {
	case packets.Publish:
		return s.publish(pk)
	case packets.Puback:
		s.out.ack(pk.PacketID)
		return nil
	case packets.Subscribe:
		return s.subscribe(pk)
	case packets.Unsubscribe:
		return s.unsubscribe(pk)
	case packets.Pingreq:
		s.answer(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingresp}}) // [MQTT-3.12.4-1]
		return nil
	case packets.Disconnect:
		if pk.ReasonCode == packets.CodeDisconnectWillMessage.Code {
			return errors.New("the device left its Last Will")
		}
		return errGoodbye
	}
	return packets.ErrProtocolViolation // a second CONNECT [MQTT-3.1.0-2], or what only a server sends
}

func (s *session) answer(pk packets.Packet) {
	pk.ProtocolVersion = s.version
	s.out.answer(pk)
}

// publish takes a shadow request. Nothing is retained and nothing forwarded.
func (s *session) publish(pk packets.Packet) error {
	if code := pk.PublishValidate(0); code != packets.CodeSuccess {
		return code
	}
	if pk.FixedHeader.Qos > 1 {
		return packets.ErrQosNotSupported // [MQTT-3.2.2-11]
	}
	puback := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Puback}, PacketID: pk.PacketID}
	if !mayPublish(s.thing, pk.TopicName) {
		if s.version < 5 || pk.FixedHeader.Qos == 0 {
			return packets.ErrNotAuthorized // there is no other way to say so
		}
		puback.ReasonCode = packets.ErrNotAuthorized.Code
		s.answer(puback)
		return nil
	}
	s.request(pk.TopicName, pk.Payload)
	if pk.FixedHeader.Qos == 1 {
		s.answer(puback)
	}
	return nil
}

// request passes a device's request on; it returns when that was dealt with.
func (s *session) request(topic string, payload []byte) {
	if a, op, ok := shadow.ParseTopic(topic); ok {
		s.broker.handle(context.Background(), s.thing, a, op, payload)
	}
}

// mayPublish allows a thing its own shadow requests and nothing else.
func mayPublish(thing, topic string) bool {
	a, _, ok := shadow.ParseTopic(topic)
	return ok && a.Thing == thing
}

// maySubscribe allows a thing what its own shadows answer. Wildcards can only
// stand behind its own name.
func maySubscribe(thing, filter string) bool {
	if _, _, request := shadow.ParseTopic(filter); request {
		return false
	}
	return strings.HasPrefix(filter, shadow.Address{Thing: thing}.Prefix()+"/") && strings.Count(filter, "/") <= slashesMost
}

func (s *session) subscribe(pk packets.Packet) error {
	if code := pk.SubscribeValidate(); code != packets.CodeSuccess {
		return code
	}
	codes := make([]byte, len(pk.Filters))
	for i, f := range pk.Filters {
		codes[i] = s.grant(f)
	}
	s.answer(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Suback}, PacketID: pk.PacketID, ReasonCodes: codes})
	return nil
}

// grant subscribes if it may be, and answers with the reason code.
func (s *session) grant(f packets.Subscription) byte {
	code := packets.CodeSuccess
	switch {
	case !validFilter(f.Filter):
		code = packets.ErrTopicFilterInvalid
	case !maySubscribe(s.thing, f.Filter):
		code = packets.ErrNotAuthorized
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.subs[f.Filter]; !known && len(s.subs) >= filtersMost {
		code = packets.ErrQuotaExceeded
	}
	if code != packets.CodeSuccess {
		if s.version < 5 {
			return packets.ErrUnspecifiedError.Code // 0x80, the only one there is [MQTT-3.9.3-2]
		}
		return code.Code
	}
	f.Qos = min(f.Qos, 1)
	s.subs[f.Filter] = f
	return f.Qos
}

// validFilter keeps the rules of wildcards [MQTT-4.7.1-1], [MQTT-4.7.1-2].
func validFilter(filter string) bool {
	levels := strings.Split(filter, "/")
	for i, l := range levels {
		if strings.ContainsAny(l, "#+") && len(l) > 1 || l == "#" && i < len(levels)-1 {
			return false
		}
	}
	return filter != ""
}

func (s *session) unsubscribe(pk packets.Packet) error {
	if code := pk.UnsubscribeValidate(); code != packets.CodeSuccess {
		return code
	}
	codes := make([]byte, len(pk.Filters))
	s.mu.Lock()
	for i, f := range pk.Filters {
		if _, known := s.subs[f.Filter]; !known {
			codes[i] = packets.CodeNoSubscriptionExisted.Code
		}
		delete(s.subs, f.Filter)
	}
	s.mu.Unlock()
	s.answer(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsuback}, PacketID: pk.PacketID, ReasonCodes: codes})
	return nil
}

// subscribed says whether a topic is subscribed to, with which QoS at most, and
// under which identifiers. Overlapping filters deliver once [MQTT-3.3.4-2].
func (s *session) subscribed(topic string) (qos byte, ids []int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for filter, sub := range s.subs {
		if filter == topic || matches(filter, topic) {
			qos, ok = max(qos, sub.Qos), true
			if sub.Identifier > 0 {
				ids = append(ids, sub.Identifier)
			}
		}
	}
	slices.Sort(ids)
	return qos, ids, ok
}

// matches applies MQTT's wildcards [MQTT-4.7.1].
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
