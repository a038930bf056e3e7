package shadow

import "strings"

// Address is where a shadow lives: its thing, such as "front-door-1", and its name. The
// empty name is the thing's classic, unnamed shadow.
type Address struct {
	Thing, Name string
}

// Operation is what a request topic asks for, such as "get".
type Operation string

// The requests of "Device Shadow MQTT topics".
const (
	OpGet    Operation = "get"
	OpUpdate Operation = "update"
	OpDelete Operation = "delete"
)

// Prefix is the ShadowTopicPrefix of "Device Shadow MQTT topics":
// "$aws/things/T/shadow" or "$aws/things/T/shadow/name/N".
func (a Address) Prefix() string {
	classic := "$aws/things/" + a.Thing + "/shadow"
	if a.Name == "" {
		return classic
	}
	return classic + "/name/" + a.Name
}

// Topic is the shadow's topic with this suffix, such as "update/delta".
func (a Address) Topic(suffix string) string {
	return a.Prefix() + "/" + suffix
}

// ParseTopic takes a request topic apart. It answers false to anything else: a response
// topic, a name that AWS would not allow, a filter with wildcards.
func ParseTopic(topic string) (Address, Operation, bool) {
	var a Address
	var op Operation
	switch s := strings.Split(topic, "/"); len(s) {
	case 5: // $aws/things/T/shadow/get
		a, op = Address{Thing: s[2]}, Operation(s[4])
	case 7: // $aws/things/T/shadow/name/N/get
		a, op = Address{Thing: s[2], Name: s[5]}, Operation(s[6])
	}
	if !a.valid() || !op.valid() || a.Topic(string(op)) != topic {
		return Address{}, "", false
	}
	return a, op, true
}

func (a Address) valid() bool {
	return ValidThing(a.Thing) && (a.Name == "" || ValidName(a.Name))
}

func (o Operation) valid() bool {
	return o == OpGet || o == OpUpdate || o == OpDelete
}

// ValidThing reports whether s can name a thing: [a-zA-Z0-9:_-]{1,128} (thingName in
// "AWS IoT Core API reference").
func ValidThing(s string) bool {
	return validName(s, 128)
}

// ValidName reports whether s can name a shadow: [a-zA-Z0-9:_-]{1,64} (shadowName in
// "AWS IoT Core API reference"). The classic shadow has no name, so "" is not one.
func ValidName(s string) bool {
	return validName(s, 64)
}

func validName(s string, longest int) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == ':', c == '_', c == '-':
		default:
			return false
		}
	}
	return 0 < len(s) && len(s) <= longest
}
