package device

import (
	"context"
	"encoding/json"
	"net/url"
	"strings"
	"time"

	"github.com/eclipse/paho.golang/autopaho"
	"github.com/eclipse/paho.golang/paho"
)

const (
	keepAlive = 20 // seconds; a dead connection is noticed within two of them

	// inFlight bounds what the broker may send before it was acknowledged; the
	// client library would reserve room for 65,535 messages.
	inFlight = 32
)

// subscriptions are the topics below $aws/things/{thing}/shadow/ that the
// device listens to, and no others.
var subscriptions = []string{
	"update/delta", "get/accepted", "get/rejected", "update/accepted", "update/rejected",
}

// backoff spreads out the attempts of many devices after a broker's restart.
var backoff = autopaho.NewExponentialBackoff(100*time.Millisecond, 10*time.Second, 300*time.Millisecond, 2)

// A linkChange tells the loop that the connection came up or went down, or that
// an attempt failed.
type linkChange struct {
	kind   Kind   // Connected, Disconnected or Unreachable
	reason string // of Unreachable
}

// A message is anything that arrives. The shadow's answers share their fields.
type message struct {
	topic string // below shadow/

	State       map[string]json.RawMessage
	Version     int64
	Timestamp   int64 // epoch seconds
	ClientToken string
	Code        int    // in rejected
	Message     string // in rejected
}

// open is desired.open as the message holds it, nil if it does not. Its key is
// looked up in a map because a struct's field would also take "Open", which is
// not kept from being written by others.
func (m message) open() []byte {
	if m.topic != "get/accepted" {
		return m.State["open"]
	}
	var delta map[string]json.RawMessage
	if json.Unmarshal(m.State["delta"], &delta) != nil {
		return nil // no delta: nothing is asked for
	}
	return delta["open"]
}

type getBody struct {
	ClientToken string `json:"clientToken"`
}

type updateBody struct {
	State struct {
		Reported reported `json:"reported"`
	} `json:"state"`
	ClientToken string `json:"clientToken"`
}

type reported struct {
	Open       *Command    `json:"open,omitempty"`
	OpenResult *openResult `json:"openResult,omitempty"`
	Battery    int         `json:"battery"` // percent
	Door       string      `json:"door"`
	Lock       string      `json:"lock"`
}

type openResult struct {
	ID     string  `json:"id"`
	Result Kind    `json:"result"`
	At     int64   `json:"at"`     // epoch milliseconds
	Reason *Reason `json:"reason"` // null, not absent: the shadow merges, and would keep the reason of an earlier result
}

func (d *Device) updateBody(u *update) updateBody {
	var body updateBody
	body.ClientToken = u.token
	now := &body.State.Reported
	*now = reported{Battery: d.battery, Door: "closed", Lock: "locked"}
	if !d.locked {
		now.Lock = "unlocked"
	}
	if r := u.result; r != nil {
		now.Open = &r.Command
		now.OpenResult = &openResult{ID: r.Command.ID, Result: r.Result, At: r.At}
		if r.Reason != "" {
			now.OpenResult.Reason = &r.Reason
		}
	}
	return body
}

// connect begins to connect, and to connect again whenever the connection is
// lost, until ctx ends. What it returns waits for the end of that.
func (d *Device) connect(ctx context.Context) (disconnect func(), err error) {
	d.publish = func(topic string, body any) {
		d.publishing.Go(func() { d.publishNow(ctx, topic, body) })
	}
	d.GoOffline(d.cfg.Faults.OfflineFor)
	manager, err := autopaho.NewConnection(ctx, autopaho.ClientConfig{
		ServerUrls:           []*url.URL{{Scheme: "tls", Host: d.cfg.Broker}},
		TlsCfg:               d.tls,
		KeepAlive:            keepAlive,
		ReconnectBackoff:     d.untilNextAttempt,
		ConnectPacketBuilder: cleanSession,
		OnConnectionUp: func(m *autopaho.ConnectionManager, _ *paho.Connack) {
			d.publishing.Go(func() { d.subscribe(ctx, m) })
		},
		OnConnectionDown: func() bool {
			d.tell(ctx, linkChange{kind: Disconnected})
			return true
		},
		OnConnectError: func(err error) {
			d.tell(ctx, linkChange{kind: Unreachable, reason: err.Error()})
		},
		ClientConfig: paho.ClientConfig{
			ClientID:          d.cfg.Thing,
			OnPublishReceived: []func(paho.PublishReceived) (bool, error){d.receive(ctx)},
		},
	})
	if err != nil {
		return nil, err
	}
	d.manager.Store(manager)
	return func() {
		<-manager.Done()
		d.publishing.Wait()
	}, nil
}

// cleanSession asks for a new session each time, one that ends with the
// connection: no command may wait at the broker for a device that comes back.
func cleanSession(c *paho.Connect, _ *url.URL) (*paho.Connect, error) {
	bound := uint16(inFlight)
	c.CleanStart = true
	c.Properties = &paho.ConnectProperties{ReceiveMaximum: &bound} // no session expiry means 0
	return c, nil
}

// subscribe makes a new connection useful. One that cannot be subscribed is
// given up: a lock that hears nothing had better look offline.
func (d *Device) subscribe(ctx context.Context, m *autopaho.ConnectionManager) {
	if d.offlineFor() > 0 { // GoOffline came while it was connecting
		m.TerminateConnectionForTest()
		return
	}
	var topics []paho.SubscribeOptions
	for _, t := range subscriptions {
		topics = append(topics, paho.SubscribeOptions{Topic: d.prefix() + t, QoS: 1})
	}
	if _, err := m.Subscribe(ctx, &paho.Subscribe{Subscriptions: topics}); err != nil {
		d.tell(ctx, linkChange{kind: Unreachable, reason: "subscribe: " + err.Error()})
		m.TerminateConnectionForTest()
		return
	}
	d.tell(ctx, linkChange{kind: Connected})
}

// receive hands messages to the loop, one after the other.
func (d *Device) receive(ctx context.Context) func(paho.PublishReceived) (bool, error) {
	return func(p paho.PublishReceived) (bool, error) {
		m := message{topic: strings.TrimPrefix(p.Packet.Topic, d.prefix())}
		if err := json.Unmarshal(p.Packet.Payload, &m); err != nil {
			return false, err // nothing that a shadow would send
		}
		select {
		case d.messages <- m:
		case <-ctx.Done():
		}
		return true, nil
	}
}

func (d *Device) tell(ctx context.Context, change linkChange) {
	select {
	case d.links <- change:
	case <-ctx.Done():
	}
}

// publishNow sends body with QoS 1. An error needs no care here: then the answer
// does not come, and the loop acts on that.
func (d *Device) publishNow(ctx context.Context, topic string, body any) {
	payload, err := json.Marshal(body)
	if err != nil {
		return
	}
	_, _ = d.manager.Load().Publish(ctx, &paho.Publish{Topic: d.prefix() + topic, QoS: 1, Payload: payload})
}

func (d *Device) prefix() string {
	return "$aws/things/" + d.cfg.Thing + "/shadow/"
}

// GoOffline breaks the connection, as a lost network does, and keeps the device
// from connecting for this long. It may be called from any goroutine while Run
// runs.
func (d *Device) GoOffline(length time.Duration) {
	until := time.Now().Add(length)
	d.offlineUntil.Store(&until)
	if m := d.manager.Load(); m != nil {
		m.TerminateConnectionForTest()
	}
}

func (d *Device) untilNextAttempt(attempt int) time.Duration {
	return max(d.offlineFor(), backoff(attempt+1))
}

// offlineFor is how much longer the device is to stay offline.
func (d *Device) offlineFor() time.Duration {
	return time.Until(*d.offlineUntil.Load())
}
